"Packaging: everything that can change stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=cfg["keywords"],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["emoji/**/*", "emoji_flow/**/*", "*.npz", "*.safetensors"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()} | {
        extra: [extra] for extra in ("tensorboard", "wandb", "bitsandbytes", "openai")} | {
        "rapidocr": ["rapidocr", "onnxruntime"],
        "docs": ["sphinx", "myst-nb", "sphinx-book-theme", "playwright"]},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
