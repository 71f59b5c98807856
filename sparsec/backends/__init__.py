"""Back ends: who turns a step of a plan into a callable kernel on one kind of device."""
