"""``tstitch-trt ui``: a page in the browser that draws at any stitch point (Gradio, the extra ``ui``)."""
