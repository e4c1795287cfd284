"""Are data, latents and models fit for what comes next?"""
