"""Parts of the command line beside training: options, the pretrained model, the run folder,
figures.
"""
