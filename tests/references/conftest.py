"""The scripts that make the references need torch, so doctest does not import them."""

collect_ignore_glob = ["make_*.py"]
