"""What depends on machines: sizes of blocks and lanes, what is written out, and from where on something pays.

No number here is part of a model's or an algorithm's definition. Each says what it trades off, and which claims of
which script in `benchmarks/` measure its effect; where no benchmark does, what to time by hand.
"""

# --- Fast memory.

# Temporaries of an E-step on one block of rows, in bytes. On a CPU larger blocks outgrow the second-level cache, and
# smaller ones pay the overhead of more rounds. Benchmark: gaussian_mixture a, d.
BLOCK_BYTES = 8 << 20

# The same on an accelerator, where temporaries should only be small against its memory, and every round launches all
# kernels again. By hand: N = 2M, D = 8, K = 32, full covariances.
BLOCK_BYTES_ON_ACCELERATORS = 1 << 29

# Rows of a block at least, however many temporaries a row needs: the overhead of a round should stay below its work.
# A power of two. Benchmark: gaussian_mixture e.
FEWEST_BLOCK_ROWS = 1 << 8

# Rows of a block at most: longer rounds gain nothing. A power of two. By hand: N = 2M, D = 1, K = 2.
MOST_BLOCK_ROWS = 1 << 20

# Temporaries of one step of all lanes, in numbers. More lanes share the overhead of a step, until their temporaries
# outgrow the second-level cache of a CPU's core. Benchmark: gaussian_mixture b, c; hmm c.
LANE_NUMBERS = 1 << 21

# The same on an accelerator, which has threads for more. By hand: 4096 restarts on 272 rows, D = 2, K = 3.
LANE_NUMBERS_ON_ACCELERATORS = 1 << 28

# Lanes at most, which only small problems and accelerators reach: every lane keeps a history, and of more lanes more
# stand idle at the end. A power of two. By hand: 2**14 restarts of two Poisson components on 10 rows.
MOST_LANES = 1 << 12

# --- From where on something pays.

# Lanes are refilled once one in this many has ended. Later, more of them stand idle; sooner, results are written away
# and lanes loaded more often. Benchmark: gaussian_mixture b, c; kmeans c.
LANES_PER_IDLE_LANE = 4

# Restarts times the temporaries of one E-step, in numbers, from which on a coarse bulk saves more time than the second
# program adds to a first call. Benchmark: gaussian_mixture b, c, which show compilation apart.
COARSE_WORK = 1 << 23

# Sequences side by side from which on the moments of a linear equation are one product for every step, and not one for
# every sequence: a product is quick where the axis that it sums over is long. Benchmark: lds a, b.
MANY_SEQUENCES = 32

# Parameters up to which the spectrum of the EM map is that of the whole matrix; directions of the Krylov space beyond.
# By hand: a mixture of 8 normals in 10 columns, 527 parameters.
SPECTRUM = 40

# --- What is written out. Straight-line code fuses with its neighbours, as products and loops do not, but it grows with
# the square of its size, and so does the time that it takes to compile.

# Columns of quadratic forms of normal components. Benchmark: gaussian_mixture b, c (written out), a.
UNROLLED_SQUARES = 4

# Columns of factorisations, and of the diagonal blocks that triangular inverses start from. Benchmark:
# gaussian_mixture b (written out), a, e.
UNROLLED_FACTOR = 8

# Slices of rows that one round of a tournament for the largest score compares. More slices make fewer rounds, between
# which winners pass through memory, and longer code. Benchmark: kmeans a.
TOURNAMENT_SLICES = 4

# Rows of scores up to which one round compares them all. Benchmark: kmeans b.
TOURNAMENT_ROWS = 8

# --- Groups of rows.

# Products of columns that are summed over groups side by side: a sum costs a fixed time a row, however many it is of,
# and its temporaries are so many numbers a row. Benchmark: regressions b.
PRODUCTS_AT_A_TIME = 64

# --- Missing values.

# Numbers of the conditional covariances of one component, of rows side by side: over all entries of a row they stay in
# the second-level cache of a CPU's core. Benchmark: latents b.
CONDITIONAL_NUMBERS = 1 << 16

# Such rows at least, a power of two: whole vectors. By hand: N = 20000, D = 100, a fifth of the entries missing.
FEWEST_CONDITIONAL_LANES = 1 << 6

# --- k-means.

# Scores of a block of rows against all centres take one part in this many of what a block may take: the rounds of the
# tournament go over them again and again, in the nearest cache. Benchmark: kmeans a.
SCORES_PER_BLOCK = 32

# Blocks are no longer for fewer centres than this: rows themselves take room. Benchmark: kmeans b, c.
FEWEST_CENTRES = 64

# Rows that the anchor of expanded distances is taken from. More of them come nearer to the mean, about which distances
# cancel least; all of them would take a good part of a step. Benchmark: kmeans a, b.
ANCHOR_ROWS = 1024

# Classes of row numbers, whose farthest rows are the candidates for empty clusters, are a multiple of this: whole
# vectors. By hand, since no benchmark has empty clusters: N = 131072, D = 16, K = 64.
CLASSES_MULTIPLE = 32

# --- Chains and linear systems.

# Temporaries in bytes from which on the observations of sequences are looked at in blocks of rows. Blocks keep them
# small, and cost the recursion's layout another pass. Benchmark: hmm d.
BLOCKS_OF_STEPS_FROM = 1 << 26

# States up to which a product with one vector is a sum: no call of a matrix library at every step. Benchmark: hmm b.
UNROLLED_STATES = 12

# States up to which chains side by side under `vmap` are lanes, the last axis. Benchmark: hmm c.
STATES_OF_LANES = 6

# Numbers in the transitions of such chains from which on sums over states are written out: XLA sums so many on a CPU by
# a library call a step, up to ten times slower. Benchmark: hmm c.
WIDE_TRANSITIONS = 4000

# Lanes that a recursion of means over one long sequence should have: more of them make fewer steps, and more work in
# all. Benchmark: lds b.
LANES_OF_MEANS = 64

# The same on an accelerator, where a step costs far more than a lane. By hand: one sequence of 100000 steps, 4 states.
LANES_OF_MEANS_ON_ACCELERATORS = 4096

# Numbers side by side up to which steps of one lane are grouped for a product. Benchmark: lds b.
GROUPED_WIDTH = 64

# Entries of a matrix up to which its product with vectors is written out, lane by lane. Benchmark: lds a.
UNROLLED_PRODUCT = 64

# Columns up to which matrices side by side are orthogonalised one by one in straight-line code, quicker than a
# loop. Benchmark: lds a, b, c.
UNROLLED_COLUMNS = 16

# Lanes that are worked on at a time, where there are more: their matrices then stay in fast memory. Benchmark: lds c.
LANES_AT_A_TIME = 256

# --- Derivatives of fits.

# Directions in the basis of one cycle of GMRES: more of them need fewer products with the Jacobian of the EM map, each
# of which is an E-step, and memory for so many copies of the parameters. Up to so many parameters one cycle is a dense
# solution: the basis is a whole one. Benchmark: derivatives a, where 28 products suffice for 4210 parameters.
KRYLOV = 50
