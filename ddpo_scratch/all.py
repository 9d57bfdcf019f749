"Every public name of every chapter: `from ddpo_scratch.all import *`."
from .pipelines import *
from .prompts import *
from .sampling import *
from .rewards import *
from .animals import *
from .stat_tracker import *
from .loss import *
from .config import DDPOConfig
from .training import *
from .models.families import *
from .scorers.names import *
from .scorers.scorers import *
from .trainer.config import *
from .trainer.presets import PRESETS, PROMPTS, PromptFile, make_config, make_prompt_fn
from .trainer.policy import *
from .trainer.gradient import *
from .trainer.checkpoints import Stopped
from .trainer.lora import *
from .trainer.trainer import *
from .trainer.ddpo import DDPOTrainer
from .trainer.draft import *
from .trainer.forward import *
from .trainer.preferences import *
from .trainer.trainer import TrainingState
from .trainer.evaluation import *
from .command.run import run_training
