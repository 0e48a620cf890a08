"""The ``silo`` command. Modules are grouped by what they talk about; heavy imports happen in the commands."""
