"""The application: fine-tunes a published model with LoRA, from one YAML file.

    python -m train CONFIG.yaml [section.key=value ...]

Made to be read top to bottom and forked: `finetune.run` is the whole story, and every module
beside it is one chapter. `config` holds every setting and every default; what a run asks of a
model is one file of `tasks`.
"""
