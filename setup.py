"""What pyproject.toml cannot say: the folder ``train`` is installed as ``lora_jax_train``.

From a checkout the application is ``python -m train``. Installed, a module named ``train``
would take a name that is not ours, so its packages are found and renamed here.
"""

from setuptools import find_packages, setup

library = find_packages(include=["lora_jax", "lora_jax.*"])
application = find_packages(include=["train", "train.*"])

setup(
    packages=library + [f"lora_jax_{name}" for name in application],
    package_dir={"lora_jax_train": "train"},
    package_data={"": ["py.typed", "*.json", "*.html", "*.md", "*.yaml"]},
)
