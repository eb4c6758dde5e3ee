"""Named in annotations."""


class FusibleOperation: ...


class Sequential: ...
