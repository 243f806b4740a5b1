"""Audio and text from nothing but a seed: the three domains of the demo corpus, rendered clip by clip.

`render` turns an order (seed, split, domain, number) into a clip. `speech` speaks sentences of `grammar` through `espeak`,
`sound` stages the classes of `textures`, `calls` and `impacts`, `music` plays the `instruments`. All of them draw on the
building blocks of `signals`, end in `room` and describe what they did through `captions`.
"""
