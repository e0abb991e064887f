"""Jobs and launchers that train with Conda: the outermost layer of the package.

`pretrain` is the job, `compare` runs several of them. Within, each file imports only from those
named before it: `config`, `options`; `runtime`; `cache`, `sources`, `tokenizer`, `batches`, `data`;
`model`, `optimizers`, `schedule`, `tensors`, `engine`; `checkpoint`; `metrics`, `picture`,
`console`, `report`; `signals`, `trainer`, `pretrain`; `comparison`, `compare`.
"""
