"""placeholder until the spine stands"""
