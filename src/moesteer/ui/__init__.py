"""A page in the browser to look and try: chat with and without masks, routing, runs and audits (`moesteer ui`)."""
