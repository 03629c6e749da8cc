from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

DISTILL = ["accelerate>=1.0", "prodigyopt>=1.1", "tensorboard>=2.16"]
# what the evaluation compares with; also asks for torch>=2.7.1 and diffusers>=0.36; verified with 1.5.3
BASELINES = ["cache-dit>=1.5.3"]
# what diffusers' own tests import, see tests/upstream/run.sh
UPSTREAM = ["ftfy>=6", "parameterized>=0.9", "requests-mock>=1.12"]
SERVE = [
    "ray[serve]>=2.50",
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "python-multipart>=0.0.18",
    "prometheus-client>=0.21",
    "limits>=4",
    "imageio[ffmpeg]>=2.34",
    "httpx>=0.28",
]
# optical flow, for the metrics of videos
FLOW = ["opencv-python-headless>=4.8"]
TEST = [
    *SERVE,
    *FLOW,
    "openai>=3.54",
    "schemathesis>=4",
    "playwright>=1.48",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "accelerate>=1.0",
    "psutil>=5.9",
    "scikit-image>=0.24",
    "import-linter>=2.17",
    "torchao>=0.15",
    "gguf>=0.10",
    "bitsandbytes>=0.48; platform_system == 'Linux'",
    # drives a Chromium that is installed; brings none
    "playwright>=1.50",
]

setup(
    name="ddit-rt",
    version="0.2.0",
    description="Diffusion transformers that choose their patch size anew at every denoising step",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ itself is no package: a top-level `kernels` would shadow the Hugging Face package of that name.
    packages=[*find_packages(include=["ddit_rt", "ddit_rt.*"]), "ddit_kernels"],
    package_dir={"ddit_kernels": "kernels/ddit_kernels"},
    package_data={
        "ddit_rt": [
            "py.typed",
            "demo/model/*",
            "demo/model/*/*",
            "demo/model_256/*",
            "demo/model_256/*/*",
            "demo/video_model/*",
            "demo/video_model/*/*",
            "evaluate/adherence/*.json",
            "evaluate/adherence/*.safetensors",
            "demo/schedules/*.json",
            "demo/schedules/*/*/*.json",
            "demo/*.j2",
            "demo/*.txt",
            "evaluate/*.txt",
            "evaluate/*.j2",
            "serve/playground/*.html",
            "serve/playground/*.js",
            "serve/playground/*.css",
            "serve/playground/*.svg",
        ]
    },
    install_requires=[
        # Triton before 3.4 takes no constant tuples in kernels, and asks for a GPU when a tuned kernel is defined
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "diffusers>=0.37",
        "transformers>=5.13",
        "peft>=0.17",
        "safetensors>=0.4",
        "huggingface_hub>=0.30",
        "einops>=0.8",
        "filelock>=3.12",
        "numpy",
        "pillow",
        "pydantic>=2.10",
        "pyyaml>=6",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "typer>=0.12",
        "rich>=13",
        "jinja2>=3",
        "torchmetrics>=1.4",
        "scipy>=1.11",
    ],
    extras_require={
        "distill": DISTILL,
        "flash": ["flash-attn>=2.7"],
        "quantize": ["torchao>=0.15"],
        "eval": ["torchmetrics[image,multimodal]>=1.4", "datasets>=3", "imageio[ffmpeg]>=2.34", *FLOW],
        "baselines": BASELINES,
        "reward": ["image-reward>=1.5"],
        "serve": SERVE,
        # engines with a plug-in of ours, at the versions it was run with; each pins torch and diffusers itself
        "sglang": ["sglang[diffusion]>=0.5.23"],
        "vllm-omni": ["vllm-omni>=0.30"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        "test": TEST,
        "upstream": UPSTREAM,
        "dev": [*TEST, *DISTILL, "ruff>=0.6", "mypy>=1.11"],
    },
    entry_points={
        "console_scripts": ["ddit-rt = ddit_rt.cli:main"],
        "sglang.multimodal_gen.plugins": ["ddit_rt = ddit_rt.integrations.sglang:register"],
        "vllm_omni.general_plugins": ["ddit_rt = ddit_rt.integrations.vllm_omni:register"],
    },
)
