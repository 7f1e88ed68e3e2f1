"""Starting real SGLang servers with the flags that this project needs."""
