import torch
from torch import nn

from semisupervised.teacher import Teacher


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 2, 3, padding=1)
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        self.decoder.norm = nn.BatchNorm2d(2)
        self.decoder.deep_supervision = True

    def forward(self, x):
        return self.decoder.norm(self.encoder(x))


def test_the_teacher_is_the_moving_average():
    torch.manual_seed(0)
    student = Net()
    teacher = Teacher(student, decay=0.9)
    expected = student.encoder.weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            student.encoder.weight.add_(torch.randn_like(expected))
            student.decoder.norm.num_batches_tracked += 1
        teacher.update(step)
        decay = min(0.9, step / (step + 1))
        expected = decay * expected + (1 - decay) * student.encoder.weight.detach()
        torch.testing.assert_close(teacher.network.encoder.weight, expected)
    assert teacher.network.decoder.norm.num_batches_tracked == 30
    assert student.decoder.deep_supervision
    assert not teacher.network.decoder.deep_supervision
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_the_first_update_takes_the_student():
    student = Net()
    teacher = Teacher(student, decay=0.999)
    with torch.no_grad():
        student.encoder.weight.add_(1)
    teacher.update(0)
    assert torch.equal(teacher.network.encoder.weight, student.encoder.weight)


def test_saved_weights_give_the_same_teacher():
    first, second = Teacher(Net(), 0.9), Teacher(Net(), 0.9)
    second.load_state_dict(first.state_dict())
    image = torch.randn(1, 1, 5, 5)
    assert torch.equal(first(image), second(image))
    assert not first(image).requires_grad
