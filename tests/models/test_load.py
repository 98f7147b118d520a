"""Loading as users do: checkpoints in the hub's layout, sharded, quantised, spread, with adapters; processors without torchvision."""

import copy
import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.hidden import entrance, final_hidden
from retention.attach.soft import attach_gates
from retention.gates.dbtrim import DBTrim
from retention.models.family import fingerprint
from retention.models.load import ModelConfig, load_configured, load_frozen
from retention.policies import POLICIES
from tests import hub, zoo
from tests.cache.helpers import gap

IMAGES = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "smolvlm"]
WITHOUT = pytest.mark.skipif(
    find_spec("torchvision") is not None, reason="torchvision is installed: nothing is missing"
)
BASE = "qwen3_vl"


def loads(**changes):
    return load_configured(ModelConfig(name=str(zoo.saved(BASE)), device="cpu", **changes))[0]


def works(model, dtype=torch.float32):
    """A gradient for gates and an eviction on this base."""
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in zoo.batch(BASE, images=True).items()}
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=10.0), model)
    with attach_gates(model, gates):
        final_hidden(model, entrance(model, inputs)).float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gates.parameters())
    assert all(p.grad is None for p in model.parameters())
    with evicting(model, POLICIES["db_trim_kv"](), CacheConfig(Budget(6.0)), gates=gates) as cache, torch.no_grad():
        logits = model(**inputs, past_key_values=cache).logits
        assert cache.kept().float().mean() <= 6
    return logits.float()


@WITHOUT
@pytest.mark.parametrize("family", IMAGES)
def test_images_need_no_torchvision_and_videos_name_the_extra(family):
    _, processor = zoo.loaded(family)
    mark = hub.HUB[family].image
    assert "pixel_values" in processor(text=[mark], images=[[zoo.picture(16, 16)]], return_tensors="pt")
    with pytest.raises(ValueError, match=r"videos need torchvision; .*retention\[video\]"):
        processor(text=["<video>"], videos=[[zoo.picture(16, 16)] * 4], return_tensors="pt")


@WITHOUT
@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_pixtral_rows_breaks_and_end(family):
    """A 24 x 32 picture is 6 x 8 patches; merged two by two 3 x 4."""
    _, processor = zoo.loaded(family)
    tokens = processor(text=["a[IMG]b"], images=[[zoo.picture(24, 32)]], return_tensors="pt")["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(tokens.tolist())
    rows, columns = (6, 8) if family == "pixtral" else (3, 4)
    row = ["[IMG]"] * columns
    expected = ["a", *([*row, "[IMG_BREAK]"] * (rows - 1)), *row, "[IMG_END]", "b"]
    assert words == expected


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    import transformers.models.smolvlm.processing_smolvlm as smolvlm

    monkeypatch.setattr(smolvlm, "num2words", None, raising=False)
    with pytest.raises(
        ValueError, match=r"needs the package num2words; install it with pip install 'retention\[video\]'"
    ):
        load_frozen(str(zoo.saved("smolvlm")), device="cpu")


@pytest.mark.parametrize("family", ["llava", BASE, "gemma3"])
def test_chat_templates_come_along(family):
    _, processor = zoo.loaded(family)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == f"user: {hub.HUB[family].image}What?\nassistant: "


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    model = loads(dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    if dtype == "bfloat16":
        assert fingerprint(model)["weight_hash"] == fingerprint(zoo.loaded(BASE)[0])["weight_hash"]
    assert torch.isfinite(works(model, model.dtype)).all()


def test_sharded_weights_load_the_same(tmp_path):
    zoo.loaded(BASE)[0].save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        shutil.copy(zoo.saved(BASE) / name, tmp_path)
    inputs = zoo.batch(BASE, images=True)
    model, _ = load_frozen(str(tmp_path), device="cpu")
    assert torch.equal(model(**inputs).logits, zoo.loaded(BASE)[0](**inputs).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**hub.TEXT, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    hub.tokenizer({}).save_pretrained(tmp_path)
    model, tokenizer = load_frozen(str(tmp_path), device="cpu")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    start = entrance(model, dict(tokenizer(["two words", "one"], padding=True, return_tensors="pt")))
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8), model)
    with attach_gates(model, gates):
        model.get_output_embeddings()(final_hidden(model, start)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in gates.parameters())


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_quantised_bases(kind):
    model = loads(quantization=kind, dtype="bfloat16")
    linear = type(model.get_decoder().layers[0].mlp.up_proj).__name__
    assert linear == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[kind]
    assert fingerprint(model) == fingerprint(loads(dtype="bfloat16")) | {
        "config_hash": fingerprint(model)["config_hash"]
    }
    assert torch.isfinite(works(model, torch.bfloat16)).all()


def test_gates_of_a_base_fit_the_same_base_quantised():
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8), zoo.loaded(BASE)[0])
    gates.check(loads(quantization="4bit", dtype="bfloat16"))


def test_parts_may_lie_on_disk():
    """accelerate's table; activations stay on one device, so gates and caches work as ever."""
    own = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    table = {"model.visual": "cpu", "lm_head": "cpu", **{f"model.language_model.{name}": "cpu" for name in own}}
    table |= {"model.language_model.layers.1": "disk", "model.language_model.layers.2": "disk"}
    folder = zoo.saved(BASE)
    model, _ = load_frozen(str(folder), device_map=table)
    assert model.get_decoder().layers[1].self_attn.q_proj.weight.device.type == "meta"
    assert torch.isfinite(works(model)).all()
    inputs = zoo.batch(BASE, images=True)
    assert gap(model(**inputs).logits, zoo.loaded(BASE)[0](**inputs).logits) < 1e-5


def lora(folder, model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("mode", ["merged", "attached"])
@pytest.mark.parametrize("how", ["named", "by itself"])
def test_a_base_with_an_adapter(tmp_path, mode, how):
    expected = lora(tmp_path, load_frozen(str(zoo.saved(BASE)), device="cpu")[0])
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(zoo.saved(BASE))}))
    if how == "named":
        model = loads(adapter=str(tmp_path), adapter_mode=mode)
    else:
        model, _ = load_frozen(str(tmp_path), device="cpu", adapter_mode=mode)
    inputs = zoo.batch(BASE, images=True)
    with torch.no_grad():
        got, plain = model(**inputs).logits, zoo.loaded(BASE)[0](**inputs).logits
        assert gap(got, expected(**inputs).logits) < 1e-4
    assert gap(got, plain) > 1e-2
    assert type(model) is type(zoo.loaded(BASE)[0])
    assert str(tmp_path) in model.config.name_or_path
    assert all(not p.requires_grad for p in model.parameters())
    works(model)


def test_an_adapter_is_not_merged_into_a_quantised_base():
    with pytest.raises(ValueError, match=r"without loss; set model\.adapter_mode=attached"):
        ModelConfig(quantization="4bit", adapter="some/adapter")


@pytest.mark.parametrize(("package", "extra", "given"), [
    ("bitsandbytes", "quantized", {"quantization": "8bit"}),
    ("peft", "peft", {"adapter": "somewhere"}),
])  # fmt: skip
def test_what_a_base_needs_is_named(monkeypatch, package, extra, given):
    import transformers.quantizers.quantizer_bnb_8bit as bnb

    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(bnb, "validate_bnb_backend_availability", _missing, raising=False)
    monkeypatch.setattr(bnb, "is_bitsandbytes_available", lambda *_: False, raising=False)
    with pytest.raises(
        ValueError, match=rf"needs the package {package}; install it with pip install 'retention\[{extra}\]'"
    ):
        loads(**given)


def _missing(*args, **kwargs):
    raise ImportError("bitsandbytes is not installed")


@pytest.mark.parametrize(("name", "bad"), [("quantization", "2bit"), ("adapter_mode", "melted"), ("dtype", "int3")])
def test_choices_are_named(name, bad):
    with pytest.raises(ValueError, match=f"expected model.{name} .* got '{bad}'"):
        ModelConfig(**{name: bad})


def test_a_folder_without_a_model_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load a model from .* \(a folder\)"):
        load_frozen(str(tmp_path))


def test_a_decoder_on_two_devices_is_refused():
    model = copy.deepcopy(zoo.loaded(BASE)[0])
    model.get_decoder().layers[1].to("meta")
    with pytest.raises(ValueError, match="decoder on one device, got cpu, meta"):
        RetentionGates.for_model(DBTrim(gate_hidden=8), model)


def test_the_embedded_model_is_whole():
    """Under every transformers that is admitted: its tower sees, and its weights have the names that all of them read."""
    model, _ = load_frozen("embedded", device="cpu")
    tower = [p for name, p in model.named_parameters() if "vision_tower" in name]
    assert sum(float(p.double().abs().sum()) for p in tower) == pytest.approx(4489.910013703032, rel=1e-9)


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    model = zoo.loaded("llama")[0]
    kept = {name: x for name, x in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    hub.tokenizer({}).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks 3 of the model's weights, e.g. model.layers.1.mlp.down_proj.weight, which"
    ):
        load_frozen(str(tmp_path), device="cpu")
