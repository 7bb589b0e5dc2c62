//! The gated delta rule a chunk of tokens at a time (Yang et al., 2024, arXiv 2406.06484 and 2412.06464), for
//! the value heads that one head of queries and keys serves.
//!
//! With `S₀` the state before the chunk, `γ_i = e^(g_1 + … + g_i)` and `D_ij = e^(g_(j+1) + … + g_i)` for
//! `j ≤ i`, nothing above the diagonal:
//!
//! ```text
//! A = β_i D_ij (K Kᵀ)_ij below the diagonal        (I + A) U = β ⊙ (V − γ ⊙ K S₀)
//! P = D ⊙ Q Kᵀ                                     O = γ ⊙ Q S₀ + P U
//! δ_j = D_Cj                                       S = γ_C S₀ + (δ ⊙ K)ᵀ U
//! ```
//!
//! `D` is made of sums of neighbouring `g`, never of differences of long sums, so that a token that forgets
//! everything does not cost those after it their precision.

use super::DeltaConfig;
use crate::buffer::Buffer;
use crate::element::Element;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::simd::{self, vectorize};
use crate::tensor::{Tensor, TensorElement};
use std::ops::Range;

mod backward;

pub(super) use backward::{HeadGradients, backward};

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 64;

/// What is added to the squared length of queries and keys before they are divided by its root.
const EPSILON: f64 = 1e-6;

/// Some neighbouring columns of an array with a row per token.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, E> {
    data: &'a [E],
    stride: usize,
}

impl<'a, E: TensorElement> Rows<'a, E> {
    /// The columns of `tensor` from `first` on.
    pub(super) fn new(tensor: &'a Tensor, first: usize) -> Self {
        Self { data: tensor.data::<E>().get(first..).unwrap_or_default(), stride: tensor.cols() }
    }

    /// One token's part for one of the heads of width `width` that begin at the first column.
    #[inline(always)]
    pub(super) fn head(&self, row: usize, head: usize, width: usize) -> &'a [E] {
        &self.data[row * self.stride + head * width..][..width]
    }

    /// The same for several tokens.
    fn matrix(&self, rows: &Range<usize>, head: usize, width: usize) -> Mat<'a, E> {
        let first = rows.start * self.stride + head * width;
        Mat::strided(&self.data[first..], rows.len(), width, self.stride)
    }
}

/// What the rule reads, for all tokens of a packed batch.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, E> {
    pub(super) config: DeltaConfig,
    /// Before they are normalised.
    pub(super) queries: Rows<'a, E>,
    /// Before they are normalised.
    pub(super) keys: Rows<'a, E>,
    pub(super) values: Rows<'a, E>,
    pub(super) decay: Rows<'a, E>,
    pub(super) beta: Rows<'a, E>,
}

impl<E: TensorElement> Source<'_, E> {
    /// Length of a query.
    #[inline(always)]
    pub(super) fn query_length(&self) -> E {
        E::ONE / E::from_f64(self.config.key_head_dim as f64).sqrt()
    }
}

/// Writes `x` with the given length (but for [`EPSILON`]) and returns what makes its length one.
#[inline(always)]
pub(super) fn normalise<E: Element>(x: &[E], length: E, out: &mut [E]) -> E {
    let inverse = E::ONE / (simd::dot(x, x) + E::from_f64(EPSILON)).sqrt();
    let factor = inverse * length;
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x * factor;
    }
    inverse
}

/// Turns the gradient of `normalised`, which [`normalise`] gave, into that of what it was given.
#[inline(always)]
fn before_normalising<E: Element>(normalised: &[E], inverse: E, length: E, gradient: &mut [E]) {
    let along = simd::dot(normalised, gradient) / (length * length);
    for (d, &n) in gradient.iter_mut().zip(normalised) {
        *d = (*d - n * along) * (inverse * length);
    }
}

fn product<E: Element>(out: MatMut<'_, E>, lhs: Mat<'_, E>, rhs: Mat<'_, E>, write: Write) {
    gemm(out, lhs, rhs, E::ONE, write, Threads::One);
}

/// Rows that are solved for one by one; the others' part in them is a matrix product.
const SOLVED: usize = 16;

/// Solves `(I + A) X = B` in place of `B: [len, cols]` for `A: [len, len]`, zero on and above the diagonal.
fn solve<E: Element>(a: &[E], len: usize, x: &mut [E], cols: usize) {
    for first in (0..len).step_by(SOLVED) {
        let block = first..(first + SOLVED).min(len);
        let (known, rest) = x.split_at_mut(first * cols);
        let x = &mut rest[..block.len() * cols];
        gemm(
            MatMut::new(x, block.len(), cols),
            Mat::strided(&a[first * len..], block.len(), first, len),
            Mat::new(known, first, cols),
            -E::ONE,
            Write::Add,
            Threads::One,
        );
        vectorize(
            #[inline(always)]
            || {
                for i in 1..block.len() {
                    let (above, row) = x.split_at_mut(i * cols);
                    let a = &a[(first + i) * len + first..][..i];
                    for (&a, above) in a.iter().zip(above.chunks_exact(cols)) {
                        simd::axpy(-a, above, &mut row[..cols]);
                    }
                }
            },
        );
    }
}

/// [`solve`] for `(I + A)ᵀ X = B`.
fn solve_transposed<E: Element>(a: &[E], len: usize, x: &mut [E], cols: usize) {
    for first in (0..len).step_by(SOLVED).rev() {
        let block = first..(first + SOLVED).min(len);
        let (rest, known) = x.split_at_mut(block.end * cols);
        let x = &mut rest[first * cols..];
        let below = len - block.end;
        gemm(
            MatMut::new(x, block.len(), cols),
            Mat::strided(&a[(block.end * len + first).min(a.len())..], below, block.len(), len).t(),
            Mat::new(known, below, cols),
            -E::ONE,
            Write::Add,
            Threads::One,
        );
        vectorize(
            #[inline(always)]
            || {
                for i in (1..block.len()).rev() {
                    let (above, row) = x.split_at_mut(i * cols);
                    let a = &a[(first + i) * len + first..][..i];
                    for (&a, above) in a.iter().zip(above.chunks_exact_mut(cols)) {
                        simd::axpy(-a, &row[..cols], above);
                    }
                }
            },
        );
    }
}

/// What the value heads of a chunk share: normalised queries and keys, and their products.
struct Shared<E: TensorElement> {
    chunk: Range<usize>,
    dim: usize,
    /// `[len, dk]`.
    queries: Buffer<E>,
    /// `[len, dk]`.
    keys: Buffer<E>,
    query_inverses: [E; CHUNK],
    key_inverses: [E; CHUNK],
    /// `Q Kᵀ`, `[len, len]`.
    query_products: Buffer<E>,
    /// `K Kᵀ`, `[len, len]`.
    key_products: Buffer<E>,
}

impl<E: TensorElement> Shared<E> {
    fn new(config: &DeltaConfig, rows: usize) -> Self {
        let (most, dim) = (rows.min(CHUNK), config.key_head_dim);
        Self {
            chunk: 0..0,
            dim,
            queries: Buffer::scratch(most * dim),
            keys: Buffer::scratch(most * dim),
            query_inverses: [E::ZERO; CHUNK],
            key_inverses: [E::ZERO; CHUNK],
            query_products: Buffer::scratch(most * most),
            key_products: Buffer::scratch(most * most),
        }
    }

    /// Normalises queries and keys and computes `K Kᵀ`.
    fn load(&mut self, source: &Source<'_, E>, chunk: &Range<usize>, head: usize) {
        let (len, dim) = (chunk.len(), self.dim);
        self.chunk = chunk.clone();
        let (queries, keys) = (&mut self.queries[..len * dim], &mut self.keys[..len * dim]);
        let length = source.query_length();
        vectorize(
            #[inline(always)]
            || {
                let out = queries.chunks_exact_mut(dim).zip(keys.chunks_exact_mut(dim));
                for (i, (row, (query, key))) in chunk.clone().zip(out).enumerate() {
                    let from = source.queries.head(row, head, dim);
                    self.query_inverses[i] = normalise(from, length, query);
                    let from = source.keys.head(row, head, dim);
                    self.key_inverses[i] = normalise(from, E::ONE, key);
                }
            },
        );
        let keys = Mat::new(keys, len, dim);
        product(MatMut::new(&mut self.key_products, len, len), keys, keys.t(), Write::Set);
    }

    /// Computes `Q Kᵀ`.
    fn compare(&mut self) {
        let (len, dim) = (self.len(), self.dim);
        let queries = Mat::new(&self.queries, len, dim);
        let keys = Mat::new(&self.keys, len, dim).t();
        product(MatMut::new(&mut self.query_products, len, len), queries, keys, Write::Set);
    }

    fn len(&self) -> usize {
        self.chunk.len()
    }

    fn keys(&self) -> Mat<'_, E> {
        Mat::new(&self.keys, self.len(), self.dim)
    }

    fn queries(&self) -> Mat<'_, E> {
        Mat::new(&self.queries, self.len(), self.dim)
    }
}

/// `out_i = factors_i · rows_i`.
fn scale_rows<E: Element>(
    factors: impl Iterator<Item = E>,
    rows: &[E],
    out: &mut [E],
    cols: usize,
) {
    vectorize(
        #[inline(always)]
        || {
            let rows = rows.chunks_exact(cols).zip(out.chunks_exact_mut(cols));
            for (factor, (row, out)) in factors.zip(rows) {
                for (out, &x) in out.iter_mut().zip(row) {
                    *out = factor * x;
                }
            }
        },
    );
}

fn scale<E: Element>(factor: E, x: &mut [E]) {
    vectorize(
        #[inline(always)]
        || {
            for x in x {
                *x *= factor;
            }
        },
    );
}

/// One value head in a chunk.
struct Own<E: TensorElement> {
    /// `dv`.
    width: usize,
    /// `β`.
    beta: [E; CHUNK],
    /// `γ`.
    kept: [E; CHUNK],
    /// `D`, `[len, len]`.
    between: Buffer<E>,
    /// `A`, `[len, len]`.
    coupling: Buffer<E>,
    /// `P`, `[len, len]`.
    scores: Buffer<E>,
    /// Room for `[len, dk]`.
    along: Buffer<E>,
}

impl<E: TensorElement> Own<E> {
    fn new(config: &DeltaConfig, rows: usize) -> Self {
        let most = rows.min(CHUNK);
        let square = || Buffer::scratch(most * most);
        Self {
            width: config.value_head_dim,
            beta: [E::ZERO; CHUNK],
            kept: [E::ZERO; CHUNK],
            between: square(),
            coupling: square(),
            scores: square(),
            along: Buffer::scratch(most * config.key_head_dim),
        }
    }

    /// Computes `β`, `γ`, `D` and `A`.
    fn load(&mut self, source: &Source<'_, E>, shared: &Shared<E>, head: usize) {
        let len = shared.len();
        let (mut total, mut sums) = (E::ZERO, [E::ZERO; CHUNK]);
        vectorize(
            #[inline(always)]
            || {
                for (i, row) in shared.chunk.clone().enumerate() {
                    let decay = source.decay.head(row, head, 1)[0];
                    let beta = source.beta.head(row, head, 1)[0];
                    total += decay;
                    self.beta[i] = beta;
                    self.kept[i] = total.exp();
                    let between = &mut self.between[i * len..][..len];
                    for (sum, between) in sums[..i].iter_mut().zip(&mut *between) {
                        *sum += decay;
                        *between = sum.exp();
                    }
                    between[i] = E::ONE;
                    between[i + 1..].fill(E::ZERO);
                    let products = &shared.key_products[i * len..][..i];
                    let coupling = &mut self.coupling[i * len..][..len];
                    for j in 0..i {
                        coupling[j] = beta * between[j] * products[j];
                    }
                    coupling[i..].fill(E::ZERO);
                }
            },
        );
    }

    /// Computes `U` from the state before the chunk, if that is not zero.
    fn updates(
        &self,
        source: &Source<'_, E>,
        shared: &Shared<E>,
        head: usize,
        before: Option<&[E]>,
        updates: &mut [E],
    ) {
        let (len, width) = (shared.len(), self.width);
        match before {
            Some(state) => {
                let out = MatMut::new(updates, len, width);
                product(out, shared.keys(), Mat::new(state, shared.dim, width), Write::Set);
            }
            None => updates.fill(E::ZERO),
        }
        vectorize(
            #[inline(always)]
            || {
                for (i, (row, out)) in
                    shared.chunk.clone().zip(updates.chunks_exact_mut(width)).enumerate()
                {
                    let (beta, kept) = (self.beta[i], self.kept[i]);
                    for (u, &v) in out.iter_mut().zip(source.values.head(row, head, width)) {
                        *u = beta * (v - kept * *u);
                    }
                }
            },
        );
        solve(&self.coupling, len, updates, width);
    }

    /// Computes `P`.
    fn score(&mut self, shared: &Shared<E>) {
        let all = shared.len() * shared.len();
        let (between, products) = (&self.between[..all], &shared.query_products[..all]);
        let scores = &mut self.scores[..all];
        vectorize(
            #[inline(always)]
            || {
                for ((p, &d), &product) in scores.iter_mut().zip(between).zip(products) {
                    *p = d * product;
                }
            },
        );
    }

    /// Computes `O` into rows that start `stride` apart.
    fn read(
        &mut self,
        shared: &Shared<E>,
        before: Option<&[E]>,
        updates: &[E],
        out: &mut [E],
        stride: usize,
    ) {
        let (len, width, dim) = (shared.len(), self.width, shared.dim);
        self.score(shared);
        let mut write = Write::Set;
        if let Some(state) = before {
            scale_rows(self.kept.into_iter(), &shared.queries[..len * dim], &mut self.along, dim);
            let queries = Mat::new(&self.along, len, dim);
            let out = MatMut::strided(out, len, width, stride);
            product(out, queries, Mat::new(state, dim, width), write);
            write = Write::Add;
        }
        let out = MatMut::strided(out, len, width, stride);
        product(out, Mat::new(&self.scores, len, len), Mat::new(updates, len, width), write);
    }

    /// Puts `δ ⊙ K` into `along`.
    fn keep_keys_to_end(&mut self, shared: &Shared<E>) {
        let (len, dim) = (shared.len(), shared.dim);
        let kept = self.between[(len - 1) * len..][..len].iter().copied();
        scale_rows(kept, &shared.keys[..len * dim], &mut self.along, dim);
    }

    /// Turns the state before the chunk, zero unless it has `begun`, into that after it.
    fn carry(&mut self, shared: &Shared<E>, updates: &[E], state: &mut [E], begun: bool) {
        let (len, width, dim) = (shared.len(), self.width, shared.dim);
        self.keep_keys_to_end(shared);
        if begun {
            scale(self.kept[len - 1], state);
        }
        product(
            MatMut::new(state, dim, width),
            Mat::new(&self.along, len, dim).t(),
            Mat::new(updates, len, width),
            if begun { Write::Add } else { Write::Set },
        );
    }
}

/// The states of the value heads that a key head serves, `[group, dk, dv]`.
pub(super) struct Carried<'a, E> {
    /// The states before the first row, and those after the last one if they are wanted.
    pub(super) states: &'a mut [E],
    /// Whether what is in `states` counts, which is otherwise zero.
    pub(super) begun: bool,
    /// Whether the states after the last row are wanted.
    pub(super) wanted: bool,
}

fn chunks_of(rows: &Range<usize>) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
    let rows = rows.clone();
    (0..rows.len().div_ceil(CHUNK)).map(move |index| {
        let first = rows.start + index * CHUNK;
        first..(first + CHUNK).min(rows.end)
    })
}

/// Computes the outputs `[rows, group · dv]` of the value heads that key head `head` serves, for the rows of
/// one sequence.
pub(super) fn forward<E: TensorElement>(
    source: &Source<'_, E>,
    rows: &Range<usize>,
    head: usize,
    carried: Carried<'_, E>,
    out: &mut [E],
) {
    let config = &source.config;
    let (width, stride) = (config.value_head_dim, config.group() * config.value_head_dim);
    let mut shared = Shared::new(config, rows.len());
    let mut own = Own::new(config, rows.len());
    let mut updates = Buffer::<E>::scratch(rows.len().min(CHUNK) * width);
    for chunk in chunks_of(rows) {
        shared.load(source, &chunk, head);
        shared.compare();
        let begun = carried.begun || chunk.start > rows.start;
        let updates = &mut updates[..chunk.len() * width];
        let states = carried.states.chunks_exact_mut(config.state_len());
        for (at, (value_head, state)) in config.served(head).zip(states).enumerate() {
            let before = begun.then_some(&*state);
            own.load(source, &shared, value_head);
            own.updates(source, &shared, value_head, before, updates);
            let out = &mut out[(chunk.start - rows.start) * stride + at * width..];
            own.read(&shared, before, updates, out, stride);
            if carried.wanted || chunk.end < rows.end {
                own.carry(&shared, updates, state, begun);
            }
        }
    }
}
