from .parser import read_args as read_args
