from internlm_lib.ranks.launch import launch  # noqa: F401
