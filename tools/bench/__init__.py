"""The benchmark tool: declared grids, peers on the same work, checked results, and the tables and plots made of them.

grid        what is measured: a YAML file becomes a list of cases
workload    a case becomes a bound mask and tensors
flex        the same masks as FlexAttention's users write them
sparse      attention of torch.sparse's products, with gradients
prepared    what a peer hands over
peers       who is measured: ours and what torch offers, one small class each
packages    likewise, packages for GPUs where they are installed
shapes      masks as those packages name them
exactness   whether a result may be used
gradients   likewise for gradients
protocol    how time and memory are measured
ceiling     what this machine could do at most
figures     what is measured without peers: planning, first calls, metadata
process     another process, asked one thing
worker      one case in a process of its own
supervisor  the cases one after the other; what crashes or hangs costs its own row
results     the result file
sheet       a result file of single figures
counting    instructions, by valgrind
provenance  machine, versions, commit
verdict     two result files compared
tables      Markdown
plots       PNG and SVG
"""
