"""One self-contained HTML page of what is known of a bundle: samples, studies, machines, commands."""
