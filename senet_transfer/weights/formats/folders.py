"""Error messages for a user who specified a folder instead of a weight file."""

from pathlib import Path

from senet_transfer.utils.text import first_of, shown

_SUFFIXES = (
    *(".pth", ".pt", ".tar", ".safetensors", ".pkl", ".caffemodel", ".bin", ".ckpt"),
    ".index.json",
)


def describe(folder: Path) -> str:
    """Return an error message that describes a folder and suggests a file to use instead."""
    names = {entry.name for entry in folder.iterdir()}
    inside = [name for name in sorted(names) if name.endswith(_SUFFIXES)]
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            f"{folder} is a distributed checkpoint (DCP) of torch.distributed.checkpoint; expected "
            "a weight file. Convert it: python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {folder} weights.pth."
        )
    if "zero_to_fp32.py" in names or any("model_states.pt" in name for name in names):
        return _deepspeed(folder, names)
    if "data.pkl" in names and ("data" in names or "version" in names):
        return (
            f"{folder} is an unpacked torch.save file; expected the file itself. Use the original "
            f"file, or pack it again without compression: cd {folder.parent} && zip -0 -r "
            f"weights.pth {folder.name}."
        )
    if "saved_model.pb" in names:
        return (
            f"{folder} is a TensorFlow SavedModel, which is not supported; expected a weight file. "
            "Use PyTorch weights for this network."
        )
    if "config.json" in names or any(name.endswith(".index.json") for name in names):
        return _hugging_face(folder, inside)
    return f"{folder} is a folder; expected a weight file. {_advice(inside)}"


def _deepspeed(folder: Path, names: set[str]) -> str:
    start = f"{folder} is a DeepSpeed checkpoint; expected a weight file. "
    whole = "mp_rank_00_model_states.pt"
    parts = sorted(folder.glob(f"*/{whole}")) + sorted(folder.glob(whole))
    if parts and not any(folder.glob("**/zero_pp_rank_*_model_states.pt")):
        return f"{start}Use the weight file in this folder: {parts[-1].relative_to(folder)}."
    return (
        f"{start}Merge its files with DeepSpeed's script in the folder "
        f"{folder if 'zero_to_fp32.py' in names else folder.parent}: "
        "python zero_to_fp32.py . weights"
    )


def _hugging_face(folder: Path, inside: list[str]) -> str:
    # The index lists the parts, which can't be used alone.
    indices = [name for name in inside if name.endswith(".index.json")]
    best = [name for name in (*indices, *inside) if "safetensors" in name] or indices or inside
    start = f"{folder} is a Hugging Face model folder; expected a weight file. "
    return start + (
        f"Use {folder / best[0]}." if best else "It contains no weights. Check the path."
    )


def _advice(inside: list[str]) -> str:
    return (
        f"Use one of the files in this folder: {first_of(map(shown, inside), 4)}."
        if inside
        else ("Check the path.")
    )
