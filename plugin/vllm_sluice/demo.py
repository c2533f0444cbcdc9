"""x"""
def add_command(s): pass
