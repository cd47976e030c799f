"""Choosing and interleaving patches, on small tensors worked out by hand."""

import torch

from dmlr.config import Config
from dmlr.loop.injection import Patches, Retrieval, caps_of, interleave, reward_slots


def test_caps_share_the_total_and_follow_the_stride():
    def caps(length, stride, each, total):
        config = Config(num_thought_tokens=length, visual_insert_stride=stride)
        config = config.replace(num_selected_patches=each, max_total_patches=total)
        return caps_of(config, torch.tensor([100, 2])).tolist()

    assert caps(4, 1, 16, 16) == [[4, 4, 4, 4], [2, 2, 2, 2]]
    assert caps(4, 1, 16, 6) == [[2, 2, 1, 1], [2, 2, 1, 1]]
    assert caps(5, 2, 3, None) == [[3, 0, 3, 0, 3], [2, 0, 2, 0, 2]]  # offsets 0, 2, 4
    assert caps(5, 2, None, 7) == [[3, 0, 2, 0, 2], [2, 0, 2, 0, 2]]
    assert caps(2, 3, None, 16) == [[16, 0], [2, 0]]
    assert caps(2, 1, None, None) == [[100, 100], [2, 2]]


def test_kept_patches_come_first_then_the_most_attended():
    config = Config(num_thought_tokens=1, initial_patch_count=2, patch_increment=2)
    retrieve = Retrieval(torch.ones(1, 4, dtype=torch.bool), config)
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    assert retrieve(attention, retrieve.nothing, torch.tensor([2])).tolist() == [[[1, 3]]]
    kept = Patches.of([[[0, 2]]], attention.device)
    assert retrieve(attention, kept, torch.tensor([3]), 1).tolist() == [[[0, 2, 1]]]
    assert retrieve(attention, kept, torch.tensor([1]), 1).tolist() == [[[0, 2]]]  # nothing leaves


def test_ties_go_to_the_lower_index_and_padding_is_never_chosen():
    retrieve = Retrieval(torch.tensor([[True, True, False]]), Config(num_thought_tokens=1, initial_patch_count=3))
    assert retrieve(torch.tensor([[[0.5, 0.5, 0.9]]]), retrieve.nothing, torch.tensor([9])).tolist() == [[[0, 1]]]


def test_interleaving_order_and_reward_slots():
    latents = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]])  # two samples
    images = torch.tensor([[[10.0], [11.0], [12.0]]])
    patches = Patches(torch.tensor([[[2, 0], [1, 0]]]), torch.tensor([[2, 1]]))
    slots, filled = interleave(latents, images, patches)
    assert slots[0, 0, :, 0][filled[0]].tolist() == [1, 12, 10, 2, 11]
    assert slots[0, 1, :, 0][filled[0]].tolist() == [3, 12, 10, 4, 11]
    assert reward_slots(patches, "think").tolist() == [[0, 3]]
    assert reward_slots(patches, "group_end").tolist() == [[2, 4]]
    assert reward_slots(patches, "think_next", 4).tolist() == [[0, 3, 6]]
    assert reward_slots(patches, "answer", 4).tolist() == [[9]]  # the last of four tokens behind six slots
