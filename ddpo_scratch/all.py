"Every public name of every chapter: `from ddpo_scratch.all import *`."
from .models import *
from .pipelines import *
from .prompts import *
from .sampling import *
from .rewards import *
from .scorers import *
from .stat_tracker import *
from .loss import *
from .lora import *
from .training import *
from .cli import *
from .emoji_model import *
