"""Objects of other libraries in pickled training states, by name: read as nothing, so that nothing of theirs runs.

``torch.load(weights_only=True)`` refuses every name that it is not given. Those listed here are of settings, records
and callbacks that trainers save beside the weights. Each is replaced by an object of ours that takes what the pickle
would give the real one and keeps none of it; the library is neither imported nor needed. Numbers and dictionaries stay
what they are, since some say how a model was trained, and so do the values in settings of OmegaConf.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import OrderedDict
from typing import Any, Final

import numpy as np

__all__ = ["STAND_INS", "Kept"]


class _Inert:
    """Takes any arguments and any state, and keeps none."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class Kept(_Inert):
    """What a node of OmegaConf holds: a value, or a list or dictionary of nodes."""

    held: object = None

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.held = state.get("_content", state.get("_val"))


class _List:
    """Makes a list, whose items the pickle then appends."""

    def __new__(cls, *args: object) -> Any:
        return list(args[0]) if args and isinstance(args[0], list | tuple) else []


class _Dictionary:
    """Makes a dictionary without a type of its own, whose items the pickle then sets."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict(args[0]) if args and isinstance(args[0], dict) else OrderedDict()


class _Parameters(dict[str, object]):
    """The tensors of a ``torch.nn.ParameterDict``, in which the first textual inversions are."""

    def __setstate__(self, state: object) -> None:
        held = state.get("_parameters") if isinstance(state, dict) else None
        self.update(held if isinstance(held, dict) else {})


class _NumberType:
    """NumPy's ``dtype`` by its letters, e.g. ``f8``, and byte order."""

    def __init__(self, letters: object = "", *args: object) -> None:
        self.letters = letters if isinstance(letters, str) and re.fullmatch(r"[fiub][1248]", letters) else ""
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            self.order = state[1]


class _Number:
    """Makes a number of NumPy's from its bytes; ``None`` of other scalars."""

    def __new__(cls, kind: object = None, content: object = b"") -> Any:
        if not isinstance(kind, _NumberType) or not isinstance(content, bytes) or not kind.letters:
            return None
        if len(content) != int(kind.letters[1:]):
            return None
        return np.frombuffer(content, kind.order + kind.letters)[0].item()


_LIGHTNING: Final = """
callbacks.model_checkpoint.ModelCheckpoint callbacks.early_stopping.EarlyStopping callbacks.timer.Timer
callbacks.lr_monitor.LearningRateMonitor callbacks.gradient_accumulation_scheduler.GradientAccumulationScheduler
callbacks.stochastic_weight_avg.StochasticWeightAveraging callbacks.weight_averaging.WeightAveraging
callbacks.weight_averaging.EMAWeightAveraging callbacks.finetuning.BaseFinetuning
callbacks.device_stats_monitor.DeviceStatsMonitor callbacks.model_summary.ModelSummary
callbacks.rich_model_summary.RichModelSummary callbacks.progress.tqdm_progress.TQDMProgressBar
callbacks.progress.rich_progress.RichProgressBar callbacks.lambda_function.LambdaCallback
callbacks.on_exception_checkpoint.OnExceptionCheckpoint callbacks.gpu_stats_monitor.GPUStatsMonitor
callbacks.throughput_monitor.ThroughputMonitor callbacks.base.Callback callbacks.callback.Callback
trainer.states.TrainerFn trainer.states.TrainerStatus trainer.states.RunningStage utilities.enums.LightningEnum
"""
_OTHERS: Final = """
omegaconf.base.Metadata omegaconf.base.ContainerMetadata omegaconf.base.Node omegaconf.base.SCMode
omegaconf.nodes.BytesNode omegaconf.nodes.PathNode omegaconf.nodes.EnumNode omegaconf.nodes.InterpolationResultNode
typing.Any typing.Optional typing.Union typing.Dict typing.List typing.Tuple
builtins.dict builtins.list builtins.tuple builtins.frozenset builtins.str builtins.int builtins.float builtins.bool
builtins.bytes builtins.object builtins.slice builtins.range
pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath
pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath
datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone
fractions.Fraction decimal.Decimal uuid.UUID enum.Enum enum.IntEnum
numpy.ndarray numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
numpy.random._pickle.__randomstate_ctor
numpy.random.bit_generator.__pyx_unpickle_SeedSequence numpy.random._pickle.__generator_ctor
numpy.random._pickle.__bit_generator_ctor numpy.random._mt19937.MT19937
numpy.random._pcg64.PCG64
torch.optim.adam.Adam torch.optim.adamw.AdamW torch.optim.sgd.SGD torch.optim.rmsprop.RMSprop
torch.optim.lr_scheduler.LambdaLR torch.optim.lr_scheduler.StepLR torch.optim.lr_scheduler.MultiStepLR
torch.optim.lr_scheduler.CosineAnnealingLR torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
torch.optim.lr_scheduler.ConstantLR torch.optim.lr_scheduler.LinearLR torch.optim.lr_scheduler.OneCycleLR
torch.optim.lr_scheduler.ReduceLROnPlateau torch.optim.lr_scheduler.SequentialLR torch.torch_version.TorchVersion
torch.cuda.amp.grad_scaler.GradScaler torch.amp.grad_scaler.GradScaler
deepspeed.runtime.fp16.loss_scaler.LossScaler deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler
deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.runtime.config.DeepSpeedConfig
deepspeed.utils.tensor_fragment.fragment_address
accelerate.utils.dataclasses.DistributedType accelerate.utils.dataclasses.PrecisionType
transformers.trainer_utils.IntervalStrategy transformers.trainer_utils.SchedulerType
transformers.trainer_utils.HubStrategy transformers.trainer_utils.SaveStrategy
transformers.training_args.TrainingArguments transformers.training_args.OptimizerNames
diffusers.configuration_utils.FrozenDict
wandb.sdk.wandb_config.Config wandb.sdk.lib.config_util.Config
"""
_KEPT: Final = """
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.nodes.AnyNode omegaconf.nodes.StringNode
omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode
"""
_DICTIONARIES: Final = """
collections.defaultdict easydict.EasyDict dnnlib.util.EasyDict torch_utils.misc.EasyDict addict.addict.Dict
pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
lightning.fabric.utilities.data.AttributeDict lightning_fabric.utilities.data.AttributeDict
yacs.config.CfgNode fvcore.common.config.CfgNode ml_collections.config_dict.config_dict.ConfigDict
ml_collections.config_dict.config_dict.FrozenConfigDict box.box.Box munch.Munch
transformers.utils.generic.ModelOutput
"""


def _named(base: type, path: str) -> type:
    """A class of its own for each name, which it says itself: torch 2.6 may not take names beside classes."""
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def _stand_ins() -> list[type]:
    lightning = [
        f"{package}.{name}" for package in ("pytorch_lightning", "lightning.pytorch") for name in _LIGHTNING.split()
    ]
    kinds = {
        _Inert: (*lightning, *_OTHERS.split()),
        Kept: _KEPT.split(),
        _List: ("collections.deque",),
        _Dictionary: _DICTIONARIES.split(),
        _Parameters: ("torch.nn.modules.container.ParameterDict",),
        _NumberType: ("numpy.dtype",),
        _Number: ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        Namespace: ("types.SimpleNamespace",),
    }
    # argparse.Namespace, the command line that published training states hold, is data and no more
    return [Namespace, *(_named(base, path) for base, paths in kinds.items() for path in paths)]


# Classes called as in the pickle, as torch.serialization.safe_globals takes them
STAND_INS: Final = _stand_ins()
