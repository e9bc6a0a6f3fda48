"""Which changes to a loaded module are harmless, which are refused; diffusers itself says which is which."""

from __future__ import annotations

import pkgutil
import types
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.stock import check_stock
from tstitch_trt.pipeline.weights import weights_of

# diffusers says what will be deprecated
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

HEADS = {"attention_head_dim": 2, "norm_num_groups": 8, "layers_per_block": 1}


@cache
def shared_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    made = UNet2DConditionModel(
        block_out_channels=(32,), cross_attention_dim=32, sample_size=8, dropout=0.0, **blocks, **HEADS
    )
    return made.eval()


@cache
def shared_vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()


def unet_output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    with torch.no_grad():
        found: torch.Tensor = unet(x.to(unet.dtype), 7, text.to(unet.dtype)).sample
    return found.float()


def vae_output(vae: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = vae.decode(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))).sample
    return found


def attention(unet: Any) -> Any:
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1


# --- what changes nothing


def fuse(unet: Any) -> None:
    unet.fuse_qkv_projections()


def sliced(unet: Any) -> None:
    unet.set_attention_slice("max")


def first_processor(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def offloaded(unet: Any) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(unet, CpuOffload("cpu"), append=True)
    add_hook_to_module(unet, CpuOffload("cpu"), append=True)


def offloaded_layer_by_layer(unet: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(unet, "cpu")


def fused_and_offloaded(unet: Any) -> None:
    fuse(unet)
    offloaded_layer_by_layer(unet)


def dispatched(unet: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(unet, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "to" in vars(unet)


def with_an_adapter_unloaded(unet: Any) -> None:
    ip_adapter(unet)
    unet.encoder_hid_proj = None
    unet.config.encoder_hid_dim_type = None
    unet.set_default_attn_processor()


def with_a_lora_unloaded(unet: Any) -> None:
    lora(unet)
    unet.unload_lora()


def no_longer_offloaded(unet: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    offloaded(unet)
    remove_hook_from_module(unet)
    assert "forward" in vars(unet)


def group_offloaded(unet: Any) -> None:
    unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def subclassed(unet: Any) -> None:
    class Mine(type(unet)):  # type: ignore[misc]
        """Nothing of its own but a helper."""

        def count_parameters(self) -> int:
            return sum(parameter.numel() for parameter in self.parameters())

    unet.__class__ = Mine


def noted(unet: Any) -> None:
    unet.where_it_came_from = "a file"


def freed_freeu(unet: Any) -> None:
    unet.enable_freeu(0.9, 0.2, 1.5, 1.6)
    unet.disable_freeu()


def checkpointed(unet: Any) -> None:
    unet.enable_gradient_checkpointing()


def channels_last(unet: Any) -> None:
    unet.to(memory_format=torch.channels_last)


def trained(unet: Any) -> None:
    unet.train()


HARMLESS: list[Callable[[Any], None]] = [
    fuse, sliced, first_processor, offloaded, offloaded_layer_by_layer, no_longer_offloaded, group_offloaded,
    dispatched, with_an_adapter_unloaded, with_a_lora_unloaded, fused_and_offloaded,
    subclassed, noted, freed_freeu, checkpointed, channels_last, trained,
]  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_what_changes_no_result_is_let_through(change: Callable[[Any], None]) -> None:
    """At first and at a later call; the module's own output is the witness."""
    want = unet_output(shared_unet())
    unet = deepcopy(shared_unet())
    stock = check_stock(unet, "the unet")
    change(unet)
    assert torch.allclose(unet_output(unet), want, rtol=1e-4, atol=1e-4)
    stock.check(unet)
    check_stock(unet, "the unet")


def test_what_is_compiled_is_what_it_was() -> None:
    """It is not run here, since PyTorch takes seconds to compile."""
    unet = deepcopy(shared_unet())
    stock = check_stock(unet, "the unet")
    unet.compile(backend="eager")
    unet.forward = torch.compile(unet.forward, backend="eager")
    unet.compile_repeated_blocks(backend="eager")
    stock.check(torch.compile(unet, backend="eager"))
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    stock.check(unet)
    check_stock(torch.compile(unet, backend="eager"), "the unet")
    assert weights_of(unet).keys() == shared_unet().state_dict().keys()


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_put_onto_a_compiled_module_is_refused(whole: bool) -> None:
    unet = deepcopy(shared_unet())
    stock = check_stock(unet, "the unet")
    wrapper = torch.compile(unet if whole else unet.mid_block, backend="eager")
    if not whole:
        unet.mid_block = wrapper
    called = wrapper if whole else unet
    handle = wrapper.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(BadInput, match=r"the compiled form of (it|mid_block) has forward hooks"):
        stock.check(called)
    handle.remove()
    stock.check(called)
    wrapper.forward = lambda *args, **keywords: None
    with pytest.raises(BadInput, match=r"forward of the compiled form of (it|mid_block) was replaced"):
        check_stock(called, "the unet")


def test_a_decorator_of_diffusers_that_hides_what_it_decorates_is_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in diffusers 0.35, whose ``apply_forward_hook`` does not name the function that it wraps."""
    from diffusers.utils import accelerate_utils

    vae = shared_vae()
    wrapped = accelerate_utils.apply_forward_hook(type(vae).decode.__wrapped__)
    del wrapped.__wrapped__
    wrapped.__module__ = accelerate_utils.__name__
    monkeypatch.setattr(type(vae), "decode", wrapped)
    check_stock(vae, "the vae")


@pytest.mark.parametrize("change", ["enable_slicing", "enable_tiling"])
def test_slices_and_tiles_of_a_vae_are_let_through(change: str) -> None:
    vae = deepcopy(shared_vae())
    stock = check_stock(vae, "the vae")
    getattr(vae, change)()
    stock.check(vae)


def test_functions_and_schedulers_within_modules_are_made_by_their_constructors() -> None:
    """Which of them have engines is said elsewhere."""
    from diffusers import ConsistencyDecoderVAE, UNet2DConditionModel

    skipping = UNet2DConditionModel(
        block_out_channels=(32, 32), cross_attention_dim=32, **HEADS,
        down_block_types=("SkipDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "SkipUpBlock2D"),
    )  # fmt: skip
    check_stock(skipping, "the unet").check(skipping)
    vae = ConsistencyDecoderVAE(
        encoder_block_out_channels=(32,), encoder_down_block_types=("DownEncoderBlock2D",),
        decoder_block_out_channels=(32,), decoder_down_block_types=("ResnetDownsampleBlock2D",),
        decoder_up_block_types=("ResnetUpsampleBlock2D",),
    )  # fmt: skip
    check_stock(vae, "the vae").check(vae)


# --- what does


class Doubling(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Processor:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def custom_processor(unet: Any) -> None:
    unet.set_attn_processor(Processor())


def derived_processor(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Derived(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return torch.zeros_like(hidden_states)

    attention(unet).processor = Derived()


def pag_processor(unet: Any) -> None:
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    attention(unet).processor = PAGIdentitySelfAttnProcessor2_0()


def module_processor(unet: Any) -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    attention(unet).set_processor(
        CustomDiffusionAttnProcessor2_0(train_kv=True, hidden_size=32, cross_attention_dim=32)
    )


def ip_adapter(unet: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    projection = {"proj.weight": torch.randn(128, 16, generator=generator), "proj.bias": torch.zeros(128),
                  "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}  # fmt: skip
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    weights = {f"{2 * n + 1}.to_{kind}_ip.weight": torch.randn(32, 32, generator=generator)
               for n in range(len(crossing)) for kind in "kv"}  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)


def forward_hook(unet: Any) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, out: out * 2)


def forward_pre_hook(unet: Any) -> None:
    unet.conv_out.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def patched_forward(unet: Any) -> None:
    unet.mid_block.forward = lambda x, *_, **__: x


def patched_in_front_of_offloading(unet: Any) -> None:
    own = unet.conv_out.forward
    unet.conv_out.forward = lambda x: 2 * own(x)
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(unet.conv_out, CpuOffload("cpu"))


def patched_behind_offloading(unet: Any) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(unet.conv_out, CpuOffload("cpu"))
    own = unet.conv_out._old_forward
    unet.conv_out._old_forward = lambda x: 2 * own(x)


def compiled_other(unet: Any) -> None:
    unet.conv_out.forward = torch.compile(lambda x: x[:, :4], backend="eager")


def other_accelerate_hook(unet: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):  # type: ignore[misc]
        def post_forward(self, module: Any, output: Any) -> Any:
            return 2 * output

    add_hook_to_module(unet.conv_out, Doubled())


def other_diffusers_hook(unet: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubled(ModelHook):  # type: ignore[misc]
        def post_forward(self, module: Any, output: Any) -> Any:
            return 2 * output

    HookRegistry.check_if_exists_or_initialize(unet.conv_out).register_hook(Doubled(), "doubled")


def patched_conv_forward(unet: Any) -> None:
    """As scripts for seamless textures do."""

    def circular(self: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(padded, weight, bias, self.stride)

    unet.conv_in._conv_forward = types.MethodType(circular, unet.conv_in)


def circular_padding(unet: Any) -> None:
    unet.conv_in.padding_mode = "circular"


def exchanged_class(unet: Any) -> None:
    unet.conv_out.__class__ = Doubling


def exchanged_module(unet: Any) -> None:
    other = Doubling(32, 4, 3, padding=1)
    other.load_state_dict(unet.conv_out.state_dict())
    unet.conv_out = other


def exchanged_stock_module(unet: Any) -> None:
    unet.conv_act = nn.GELU()


def left_out(unet: Any) -> None:
    unet.mid_block.attentions[0] = nn.Identity()
    unet.mid_block.attentions[0].forward = lambda x, *_, **__: (x,)


def added_module(unet: Any) -> None:
    unet.mid_block.resnets.append(nn.Identity())


def no_mid_block(unet: Any) -> None:
    unet.mid_block = None


def without_bias(unet: Any) -> None:
    unet.conv_out.bias = None


def parametrised(unet: Any) -> None:
    nn.utils.parametrizations.spectral_norm(unet.conv_out)


def reordered(unet: Any) -> None:
    layers = unet.up_blocks[0].resnets._modules
    for name in sorted(layers, reverse=True):
        layers[name] = layers.pop(name)


def backwards(unet: Any) -> None:
    class Backwards(nn.ModuleList):
        def __iter__(self) -> Any:
            return reversed(list(super().__iter__()))

    unet.up_blocks[0].resnets.__class__ = Backwards


def freeu(unet: Any) -> None:
    unet.enable_freeu(0.1, 0.2, 1.5, 1.6)


def other_scale(unet: Any) -> None:
    attention(unet).scale *= 2


def other_eps(unet: Any) -> None:
    unet.conv_norm_out.eps = 0.1


def other_time(unet: Any) -> None:
    unet.time_proj.downscale_freq_shift = 0.5


def dropout(unet: Any) -> None:
    for part in unet.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.9
    unet.train()


def fused_otherwise(unet: Any) -> None:
    unet.fuse_qkv_projections()
    attention(unet).to_qkv.weight.data.mul_(2)


def lora(unet: Any) -> None:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def quantised(unet: Any) -> None:
    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.data.to(torch.int8), requires_grad=False)


def tensor_subclass(unet: Any) -> None:
    class Own(torch.Tensor):
        pass

    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.data.as_subclass(Own))


def overriding_subclass(unet: Any) -> None:
    class Mine(type(unet)):  # type: ignore[misc]
        def get_time_embed(self, *args: Any, **keywords: Any) -> Any:
            return 0 * super().get_time_embed(*args, **keywords)

    unet.__class__ = Mine


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (custom_processor, r"processor is a \S*test_stock.Processor"),
    (derived_processor, r"Derived, which replaces AttnProcessor2_0.__call__"),
    (pag_processor, r"processor is a \S*PAGIdentitySelfAttnProcessor2_0"),
    (module_processor, r"attn1.processor"),
    (ip_adapter, r"encoder_hid_proj is a \S*MultiIPAdapterImageProjection; expected is None"),
    (forward_hook, r"mid_block.forward_hooks has"),
    (forward_pre_hook, r"conv_out.forward_pre_hooks has"),
    (patched_forward, r"mid_block.forward was replaced by \S*patched_forward"),
    (patched_in_front_of_offloading, r"conv_out.forward was replaced by \S*patched_in_front"),
    (patched_behind_offloading, r"conv_out.forward was replaced by \S*patched_behind"),
    (compiled_other, r"conv_out.forward was replaced"),
    (other_accelerate_hook, r"conv_out._hf_hook or _diffusers_hook is a \S*Doubled"),
    (other_diffusers_hook, r"conv_out._hf_hook or _diffusers_hook is a \S*Doubled"),
    (patched_conv_forward, r"conv_in._conv_forward was replaced by \S*circular"),
    (circular_padding, r"conv_in.padding_mode is 'circular'; expected is 'zeros'"),
    (exchanged_class, r"Doubling, which replaces Conv2d.forward"),
    (exchanged_module, r"Doubling, which replaces Conv2d.forward"),
    (exchanged_stock_module, r"conv_act is a \S*GELU, where \S*SiLU is expected"),
    (left_out, r"attentions.0 is a \S*Identity"),
    (added_module, r"it has a \S*Identity at mid_block.resnets.2"),
    (no_mid_block, r"mid_block"),
    (without_bias, r"conv_out.parameters are"),
    (parametrised, r"Parametrized|parametriz"),
    (reordered, r"up_blocks.0.resnets.layers are in the order 1, 0"),
    (backwards, r"Backwards, which replaces ModuleList.__iter__"),
    (freeu, r"up_blocks.0.[bs][12] is"),
    (other_scale, r"attn1.scale is"),
    (other_eps, r"conv_norm_out.eps is 0.1; expected is 1e-05"),
    (other_time, r"time_proj.downscale_freq_shift is 0.5"),
    (dropout, r"dropout|Dropout|\.p is"),
    (fused_otherwise, r"to_qkv is not what its projections would be fused to"),
    (lora, r"has LoRA layers beside its weights"),
    (quantised, r"is quantised: conv_out.weight holds torch.int8"),
    (tensor_subclass, r"is quantised: conv_out.weight is a"),
    (overriding_subclass, r"Mine, which replaces UNet2DConditionModel.get_time_embed"),
]


# Does not run, is not what this processor reads, or would have to be compiled
UNSEEN = (ip_adapter, quantised, tensor_subclass, added_module, other_scale, compiled_other, fused_otherwise)


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_changes_results_is_refused_by_name(change: Callable[[Any], None], message: str) -> None:
    """At first and at a later call. The module's own output is another one, where it still runs."""
    unet = deepcopy(shared_unet())
    stock = check_stock(unet, "the unet")
    change(unet)
    if change not in UNSEEN:
        torch.manual_seed(5)
        assert not torch.allclose(unet_output(unet), unet_output(shared_unet()), rtol=1e-3, atol=1e-3)
    for check in (partial(check_stock, unet, "the unet"), partial(stock.check, unet)):
        with pytest.raises(BadInput, match=message) as caught:
            check()
        assert caught.value.message.startswith("the unet")


# --- what is changed for all modules of a class


@pytest.fixture
def hooked() -> Any:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    yield
    handle.remove()


def test_a_hook_on_all_modules_is_refused(hooked: None) -> None:
    with pytest.raises(BadInput, match="global forward hooks"):
        check_stock(shared_unet(), "the unet")


@pytest.mark.parametrize("name", ["UNet2DConditionModel.forward", "Attention.forward", "AttnProcessor2_0.__call__"])
def test_a_patched_class_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = shared_unet()
    owners = {"UNet2DConditionModel": unet, "Attention": attention(unet), "AttnProcessor2_0": attention(unet).processor}
    owner, _, method = name.partition(".")
    cls = type(owners[owner])
    stock = check_stock(unet, "the unet")
    own = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *args, **keywords: own(self, *args, **keywords))
    for check in (partial(check_stock, unet, "the unet"), partial(stock.check, unet)):
        with pytest.raises(BadInput, match=f"{name} was replaced"):
            check()


def test_a_function_of_another_class_is_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the same library, as ``nn.Module`` alone is what others take functions over from."""
    stock = check_stock(shared_unet(), "the unet")
    monkeypatch.setattr(nn.SiLU, "forward", nn.GELU.forward)
    with pytest.raises(BadInput, match=r"SiLU.forward was replaced"):
        stock.check(shared_unet())


def test_a_patched_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch, as attention kernels are exchanged, and of diffusers' own modules."""
    from diffusers.models import embeddings

    stock = check_stock(shared_unet(), "the unet")
    with monkeypatch.context() as patch:  # also by another of the same library
        patch.setattr(torch.nn.functional, "silu", torch.nn.functional.relu)
        with pytest.raises(BadInput, match=r"torch.nn.functional.silu was replaced"):
            stock.check(shared_unet())
    functions = [(torch.nn.functional, "scaled_dot_product_attention"), (torch, "cat")]
    for home, name in [*functions, (embeddings, "get_timestep_embedding")]:
        own = getattr(home, name)
        with monkeypatch.context() as patch:
            patch.setattr(home, name, lambda *args, own=own, **keywords: own(*args, **keywords))
            with pytest.raises(BadInput, match=rf"{home.__name__}.{name} was replaced"):
                stock.check(shared_unet())
    stock.check(shared_unet())


class Doubled:
    """An object in place of a function."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return 2 * self.own(*args, **keywords)


@pytest.mark.parametrize(
    ("where", "name", "change"),
    [
        ("torch.nn.functional", "scaled_dot_product_attention", Doubled),
        ("torch.nn.functional", "silu", lambda own: partial(nn.functional.leaky_relu, negative_slope=0.5)),
        ("torch._C._nn", "silu", Doubled),
        ("torch", "exp", lambda own: torch.exp2),  # which only diffusers' own functions call
        ("torch", "sin", lambda own: torch.cos),
        ("torch.Tensor", "reshape", lambda own: lambda self, *shape: 2 * own(self, *shape)),
        ("torch.Tensor", "__add__", lambda own: lambda self, other: 2 * own(self, other)),
        ("diffusers.models.embeddings", "get_timestep_embedding", lambda own: partial(own, max_period=100)),
    ],
)
def test_what_functions_may_be_replaced_by(
    where: str, name: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = unet_output(shared_unet())
    stock = check_stock(shared_unet(), "the unet")
    monkeypatch.setattr(f"{where}.{name}", change(getattr(pkgutil.resolve_name(where), name)))
    found = unet_output(shared_unet())
    with pytest.raises(BadInput, match=rf"{where}.{name} was replaced"):
        stock.check(shared_unet())
    monkeypatch.undo()
    assert not torch.allclose(found, want, rtol=1e-3, atol=1e-3)
    stock.check(shared_unet())


@pytest.mark.parametrize("home", ["torch.nn.modules.conv", "diffusers.models.attention_processor"])
def test_other_modules_of_functions_are_refused(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{home}.F", types.SimpleNamespace(**vars(nn.functional)))
    with pytest.raises(BadInput, match=rf"{home}.F was replaced"):
        check_stock(shared_unet(), "the unet")


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), keywords: Any = None) -> Any:
        return function(*args, **(keywords or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), keywords: Any = None) -> Any:
        return function(*args, **(keywords or {}))


def test_a_mode_of_torch_that_could_do_anything_is_refused() -> None:
    """But not those of PyTorch itself, such as a default device."""
    stock = check_stock(shared_unet(), "the unet")
    for mode in (Functions(), Operations()):
        with mode, pytest.raises(BadInput, match=rf"it would run under a \S*{type(mode).__name__}") as caught:
            stock.check(shared_unet())
        assert "with block" in caught.value.hint
    with torch.device("cpu"), torch.autocast("cpu"), torch.inference_mode():
        stock.check(shared_unet())
        check_stock(shared_unet(), "the unet")


def test_functions_that_running_does_not_reach_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries add some, and exchange how models are saved and loaded."""
    monkeypatch.setattr(nn.Module, "count_all_of_them", lambda self: 3, raising=False)
    for name in ("save_pretrained", "from_pretrained"):
        monkeypatch.setattr(type(shared_unet()).__mro__[1], name, lambda self: None, raising=False)
    check_stock(shared_unet(), "the unet")


# --- what has changed since


def test_other_weights_and_other_modules_are_noticed() -> None:
    unet = deepcopy(shared_unet())
    stock = check_stock(unet, "the unet")
    with pytest.raises(BadInput, match="the unet is not the one that was accelerated"):
        stock.check(deepcopy(unet))
    delta = torch.randn(32, 2) @ torch.randn(2, 32)
    attention(unet).to_q.weight.data += 1e-3 * delta  # as fused LoRAs are
    with pytest.raises(BadInput, match=r"the unet has other weights than .*, in mid_block.*to_q.weight") as caught:
        stock.check(unet)
    assert "tstitch_trt.accelerate again" in caught.value.hint
    attention(unet).to_q.weight.data -= 1e-3 * delta


def test_a_fused_lora_is_weights() -> None:
    unet = deepcopy(shared_unet())
    lora(unet)
    unet.fuse_lora()
    unet.unload_lora()
    assert not torch.allclose(unet_output(unet), unet_output(shared_unet()), rtol=1e-3, atol=1e-3)
    check_stock(unet, "the unet").check(unet)


def test_a_changed_configuration_is_noticed() -> None:
    vae = deepcopy(shared_vae())
    stock = check_stock(vae, "the vae")
    vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(BadInput, match=r"has changed .*: scaling_factor was 0\.18215, and is 0\.5"):
        stock.check(vae)


# --- weights that are kept elsewhere, or in another type


def test_offloaded_weights_are_read_where_they_are_kept() -> None:
    unet = deepcopy(shared_unet())
    offloaded_layer_by_layer(unet)
    assert any(parameter.is_meta for parameter in unet.parameters())
    want = shared_unet().state_dict()
    found = weights_of(unet)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(BadInput, match=r"the unet has parameters without values: conv_in.weight"):
        check_stock(deepcopy(shared_unet()).to("meta"), "the unet")
    unet = deepcopy(shared_unet())
    stock = check_stock(unet, "the unet")
    stock.check(unet.to("meta"))  # they were let go when the engines had been made


def test_weights_stored_in_8_bits_are_read_in_the_type_they_are_computed_in() -> None:
    """Layerwise casting: the values are those that the module computes with, whatever they were before."""
    from diffusers.hooks import apply_layerwise_casting

    unet = deepcopy(shared_unet())
    apply_layerwise_casting(unet, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    check_stock(unet, "the unet")
    found = weights_of(unet)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in unet.parameters())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    plain = deepcopy(shared_unet())
    plain.load_state_dict(found)
    assert torch.allclose(unet_output(plain), unet_output(unet), rtol=1e-4, atol=1e-4)


def test_what_was_fused_for_speed_is_saved_once() -> None:
    """A call compares no more of it than a sample, and nothing where it was let go."""
    unet = deepcopy(shared_unet())
    unet.fuse_qkv_projections()
    assert weights_of(unet).keys() == shared_unet().state_dict().keys()
    stock = check_stock(unet, "the unet")
    attention(unet).to_qkv.weight.data[1, 0] += 1  # not in the sample
    stock.check(unet)
    with pytest.raises(BadInput, match="to_qkv is not what its projections would be fused to"):
        check_stock(unet, "the unet")
    stock.check(unet.to("meta"))
