"Every public name of every chapter: `from ddpo_scratch.all import *`."
from .models.families import *
from .pipelines import *
from .prompts import *
from .sampling import *
from .rewards import *
from .scorers.scorers import *
from .stat_tracker import *
from .loss import *
from .trainer.lora import *
from .training import *
from .command.cli import *
from .workshop.emoji_model import *
