"""Build the package from settings.ini, the one home of its metadata."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    license_expression=settings["license"],
    license_files=["LICENSE", "NOTICE"],
    python_requires=f">={settings['min_python']}",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: {version}" for version in settings["pythons"].split()),
    ],
    packages=find_packages(include=["llmft_nb", "llmft_nb.*"]),
    package_data={"llmft_nb": ["py.typed", "assets/**/*"]},
    include_package_data=False,
    install_requires=settings["requirements"].split(),
    extras_require={
        name.removesuffix("_requirements"): settings[name].split()
        for name in settings
        if name.endswith("_requirements")
    },
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
