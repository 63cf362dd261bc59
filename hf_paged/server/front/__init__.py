"""The front's side of the engines: what it asks of one, the processes, and who keeps requests alive."""
