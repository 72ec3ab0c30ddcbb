"""What run.yaml may say. Every key is data: a number, a name or a path; nothing here names a class or runs code."""

from llmt_train.config.data import CacheConfig, FromSynthetic, SyntheticConfig
from llmt_train.config.log import MlflowConfig, SampleConfig, WandbConfig
from llmt_train.config.model import CheckpointingConfig, FromConfig, LoraConfig
from llmt_train.config.objective import ClmConfig, DpoConfig, OrpoConfig
from llmt_train.config.optim import AdafactorConfig, AdamwConfig, MuonConfig, OptimConfig, RateConfig, SgdConfig
from llmt_train.config.parallel import ParallelConfig
from llmt_train.config.run import BatchConfig, EvalConfig, RunConfig, SaveConfig, TrainConfig

__all__ = [
    "AdafactorConfig",
    "AdamwConfig",
    "BatchConfig",
    "CacheConfig",
    "CheckpointingConfig",
    "ClmConfig",
    "DpoConfig",
    "EvalConfig",
    "FromConfig",
    "FromSynthetic",
    "LoraConfig",
    "MlflowConfig",
    "MuonConfig",
    "OptimConfig",
    "OrpoConfig",
    "ParallelConfig",
    "RateConfig",
    "RunConfig",
    "SampleConfig",
    "SaveConfig",
    "SgdConfig",
    "SyntheticConfig",
    "TrainConfig",
    "WandbConfig",
]
