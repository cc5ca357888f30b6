"""Pipelines in the shape of Flux, SD3 and Wan, with diffusers' own transformers, tiny and random.

Their loops are those of diffusers' pipelines in our words, less the text encoders and the decoder:
what the network is called with (σ, or 1000 σ), packed latents, guidance, `strength`, the callback.
"""

import torch

from tests.helpers.diffusers_parts import diffusers

STEPS = 4


class Shaped(diffusers.DiffusionPipeline):
    """One loop; a subclass has the transformer and calls it."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, latents, steps=STEPS, guidance=3.0, image=None, strength=1.0,
        callback_on_step_end=None,
    ):  # fmt: skip
        dynamic = self.scheduler.config.get("use_dynamic_shifting")
        self.scheduler.set_timesteps(steps, **({"mu": 0.8} if dynamic else {}))
        timesteps = self.scheduler.timesteps
        if image is not None:
            begin = steps - min(int(steps * strength), steps)
            begin *= getattr(self.scheduler, "order", 1)
            timesteps = timesteps[begin:]
            self.scheduler.set_begin_index(begin)
            sigma = self.scheduler.sigmas[begin]
            latents = (1 - sigma) * image + sigma * latents
        for index, t in enumerate(timesteps):
            output = self.denoise(latents, t, guidance)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {"latents": latents}
                latents = callback_on_step_end(self, index, t, given).pop("latents", latents)
        return latents


class Flux(Shaped):
    """Packed latents [B, tokens, C], a network that is called with σ and takes the guidance."""

    shape = (2, 16, 4)

    @staticmethod
    def transformer_of():
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=8,
            pooled_projection_dim=4,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        )

    def denoise(self, latents, t, guidance):
        count = len(latents)
        grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        return self.transformer(
            hidden_states=latents,
            timestep=t.expand(count).to(latents.dtype) / 1000,
            guidance=torch.full((count,), guidance),
            pooled_projections=torch.ones(count, 4),
            encoder_hidden_states=torch.ones(count, 3, 8),
            txt_ids=torch.zeros(3, 3),
            img_ids=torch.cat([torch.zeros(16, 1), grid], 1),
            return_dict=False,
        )[0]


class SD3(Shaped):
    """Guidance on a doubled batch, a network that is called with 1000 σ."""

    shape = (2, 2, 8, 8)

    @staticmethod
    def transformer_of():
        return diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=2,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            out_channels=2,
            pos_embed_max_size=8,
        )

    def denoise(self, latents, t, guidance):
        doubled = torch.cat([latents, latents])
        text = torch.cat([torch.zeros(len(latents), 3, 8), torch.ones(len(latents), 3, 8)])
        output = self.transformer(
            hidden_states=doubled,
            timestep=t.expand(len(doubled)),
            encoder_hidden_states=text,
            pooled_projections=text[:, 0],
            return_dict=False,
        )[0]
        plain, prompted = output.chunk(2)
        return plain + guidance * (prompted - plain)


class Wan(Shaped):
    """Videos, and guidance by two calls."""

    shape = (2, 2, 1, 8, 8)

    @staticmethod
    def transformer_of():
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=1,
            attention_head_dim=12,
            in_channels=2,
            out_channels=2,
            text_dim=8,
            freq_dim=8,
            ffn_dim=8,
            num_layers=1,
            rope_max_seq_len=16,
        )

    def denoise(self, latents, t, guidance):
        plain, prompted = (
            self.transformer(
                hidden_states=latents,
                timestep=t.expand(len(latents)),
                encoder_hidden_states=torch.full((len(latents), 3, 8), value),
                return_dict=False,
            )[0]
            for value in (0.0, 1.0)
        )
        return plain + guidance * (prompted - plain)


def make_pipeline(kind, scheduler):
    torch.manual_seed(0)
    transformer = kind.transformer_of().eval()
    for parameter in transformer.parameters():  # some are made as zeros, and all are small
        torch.nn.init.normal_(parameter, std=0.15)
    return kind(transformer, scheduler)
