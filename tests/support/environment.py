"""The environment variables of tests, whatever a user or a cluster has set."""

import tempfile
from collections.abc import MutableMapping
from pathlib import Path

# Prefixes of what is removed: hubs, launchers, devices, trackers, proxies, locales.
FOREIGN = (
    *("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH_"),
    *("SLURM_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "NODE_RANK", "NCCL_"),
    *("CUDA_", "DS_", "DEEPSPEED_", "PL_", "LIGHTNING_", "WANDB_", "MLFLOW_", "AWS_"),
    *("WHISPER_AUT_", "PYTHONWARNINGS", "LANG", "LC_", "TZ", "COLUMNS", "NO_COLOR", "FORCE_COLOR"),
    *("MPL", "XDG_"),
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
)
OURS = {
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "HF_HOME": str(Path(tempfile.gettempdir()) / "whisper-aut-tests"),  # no token, no cached model
    "HF_HUB_OFFLINE": "1",  # or the hub's client retries for a minute where there is no network
    "NO_PROXY": "*",
    "no_proxy": "*",
    # Two test processes on two cores: more threads would only wait for each other.
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
}


def clean(environment: MutableMapping[str, str]) -> None:
    """Replace the variables that could decide whether a test passes."""
    for name in [name for name in environment if name.startswith(FOREIGN)]:
        del environment[name]
    environment.update(OURS)
