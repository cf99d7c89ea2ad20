"""What the model computes, in the form that is fastest where it runs, with hand-written gradients.

Everything written for one kind of device and every hand-written backward pass lives here: products
with weights, attention, experts, moved rows, the embedding table, the softmax over the vocabulary.
No parameters, no routing and no moves over the mesh other than a kernel's own sums. The layers of
`model/` call it.
"""
