"Every public name of every chapter: `from ddpo_scratch.all import *`."
from .pipelines import *
from .prompts import *
from .sampling import *
from .rewards import *
from .animals import *
from .stat_tracker import *
from .loss import *
from .training import *
from .models.families import *
from .scorers.names import *
from .scorers.scorers import *
from .trainer.sampling import *
from .trainer.loss import *
from .trainer.lora import *
from .trainer.training import *
from .command.cli import *
from .workshop.emoji_model import *
