"""Pages and pictures from result files: jinja2 templates and matplotlib. No torch, no GPU."""
