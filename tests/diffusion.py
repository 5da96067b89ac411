"""Small models of diffusion pipelines, built from their configs, and inputs for them."""

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import lora_inject as li

TEXT, POOLED = 12, 16


def _seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def unet(xl=False):
    """Stable Diffusion's UNet; `xl` with the added conditioning and the linear projections of SDXL."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
        "use_linear_projection": True,
    }
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            layers_per_block=2,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            norm_num_groups=4,
            **(added if xl else {}),
        )
    )


def flux():
    """The transformer of Flux with one block of either kind."""
    return _seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=POOLED,
            axes_dims_rope=(2, 2, 4),
        )
    )


def clip(projection=False):
    """CLIP's text encoder; with a projection it keeps the level `text_model` that the other one lost."""
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _seeded(lambda: (CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5():
    """T5's encoder."""
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return _seeded(lambda: T5EncoderModel(config))


def run(model):
    """Returns the output on a fixed input."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(next(model.parameters()).dtype)

    with torch.no_grad():
        if isinstance(model, UNet2DConditionModel):
            added = {"text_embeds": noise(2, POOLED), "time_ids": noise(2, 6)}
            added = added if model.config.addition_embed_type else None
            return model(noise(2, 4, 8, 8), 3, noise(2, 5, TEXT), added_cond_kwargs=added).sample
        if isinstance(model, FluxTransformer2DModel):
            return model(
                hidden_states=noise(2, 6, 4),
                encoder_hidden_states=noise(2, 5, TEXT),
                pooled_projections=noise(2, POOLED),
                timestep=noise(2),
                img_ids=noise(6, 3),
                txt_ids=noise(5, 3),
            ).sample
        return model(torch.randint(2, 50, (2, 7), generator=generator))[0]


def fill(model):
    """Fills the adapters with numbers, the same for the same sites."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def deltas(model):
    """Returns every update of a parameter in float64, by the parameter's path."""
    return {
        f"{ref.path.removesuffix(f'.{name}')}.{name}": delta.double()
        for ref in li.adapters(model)
        for name, delta in ref.adapter.delta(ref.module).items()
    }


def assert_same_adapters(one, other):
    """Asserts equal sites, scalings and tensors, bit for bit."""
    first, second = li.adapter_state(one), li.adapter_state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    scalings = [{ref.path: ref.adapter.scaling for ref in li.adapters(model)} for model in (one, other)]
    assert scalings[0] == scalings[1]
