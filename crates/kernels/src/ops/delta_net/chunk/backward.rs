//! The gradients of the gated delta rule, chunk by chunk.
//!
//! In the terms of the formulas above, it goes over the chunks twice: forward, to have the state before each
//! and its `U` again, and back, carrying `dS`:
//!
//! ```text
//! dU = Pᵀ dO + δ ⊙ K dS      (I + A)ᵀ dR = dU       dA = −dR Uᵀ      dP = dO Uᵀ
//! M = dA ⊙ β_i D_ij          N = dP ⊙ D
//! dQ = γ ⊙ dO S₀ᵀ + N K      dK = δ ⊙ U dSᵀ + Nᵀ Q + (M + Mᵀ) K − βγ ⊙ dR S₀ᵀ      dV = β ⊙ dR
//! dS₀ = γ_C dS + (γ ⊙ Q)ᵀ dO − (βγ ⊙ K)ᵀ dR
//! ```

use super::{
    CHUNK, Own, Rows, Shared, Source, before_normalising, chunks_of, product, scale, scale_rows,
    solve_transposed,
};
use crate::buffer::Buffer;
use crate::element::Element;
use crate::matmul::{Mat, MatMut, Write};
use crate::ops::delta_net::DeltaConfig;
use crate::simd::{self, vectorize};
use crate::tensor::TensorElement;
use std::ops::Range;

/// Gradients of a key head and of the value heads it serves, for the rows of one sequence.
pub(in super::super) struct HeadGradients<E: TensorElement> {
    /// `[rows, dk]`.
    pub(in super::super) queries: Buffer<E>,
    /// `[rows, dk]`.
    pub(in super::super) keys: Buffer<E>,
    /// `[rows, group · dv]`.
    pub(in super::super) values: Buffer<E>,
    /// `[rows, group]`.
    pub(in super::super) decay: Buffer<E>,
    /// `[rows, group]`.
    pub(in super::super) beta: Buffer<E>,
}

/// Computes the gradients of what [`forward`](super::forward) read from that of all outputs, `[T, value_heads · dv]`.
/// `initial` are the states before the first row, `[group, dk, dv]`, zero if there are none.
pub(in super::super) fn backward<E: TensorElement>(
    source: &Source<'_, E>,
    rows: &Range<usize>,
    head: usize,
    initial: Option<&[E]>,
    gradient: Rows<'_, E>,
) -> HeadGradients<E> {
    let config = &source.config;
    let (group, width, dim) = (config.group(), config.value_head_dim, config.key_head_dim);
    let mut shared = Shared::new(config, rows.len());
    let mut own = Own::new(config, rows.len());
    let past = Past::new(source, rows, head, initial, &mut shared, &mut own);
    let mut sums = HeadGradients {
        queries: Buffer::zeros(rows.len() * dim),
        keys: Buffer::zeros(rows.len() * dim),
        values: Buffer::scratch(rows.len() * group * width),
        decay: Buffer::scratch(rows.len() * group),
        beta: Buffer::scratch(rows.len() * group),
    };
    let mut back = Back::new(config, rows.len());
    let mut d_states = Buffer::<E>::scratch(group * config.state_len());
    for chunk in chunks_of(rows).rev() {
        // The last one is there already.
        if chunk.end < rows.end {
            shared.load(source, &chunk, head);
        }
        shared.compare();
        let (len, first) = (chunk.len(), chunk.start - rows.start);
        let d_queries = &mut sums.queries[first * dim..][..len * dim];
        let d_keys = &mut sums.keys[first * dim..][..len * dim];
        let d_states = d_states.chunks_exact_mut(config.state_len());
        for (at, (value_head, d_state)) in config.served(head).zip(d_states).enumerate() {
            own.load(source, &shared, value_head);
            let given = Given {
                shared: &shared,
                updates: past.updates(&chunk, at),
                gradient: gradient.matrix(&chunk, value_head, width),
                before: past.before(&chunk, at),
            };
            let followed = chunk.end < rows.end;
            back.updates(&mut own, &given, followed.then_some(&*d_state));
            back.products(&own, &given);
            back.keys_and_queries(&given, d_queries, d_keys);
            back.states(&mut own, &given, followed.then_some(&*d_state), d_queries, d_keys);
            for (i, row) in chunk.clone().enumerate() {
                let to = first + i;
                let d_values = &mut sums.values[(to * group + at) * width..][..width];
                let value = source.values.head(row, value_head, width);
                sums.beta[to * group + at] = back.value(&own, i, value, d_values);
            }
            let decay = sums.decay[first * group + at..].iter_mut().step_by(group);
            back.decay(len, decay);
            if chunk.start > rows.start {
                back.carry(&mut own, &given, d_state, followed);
            }
        }
        let length = source.query_length();
        vectorize(
            #[inline(always)]
            || {
                for i in 0..len {
                    let at = i * dim..(i + 1) * dim;
                    let (query, d) = (&shared.queries[at.clone()], &mut d_queries[at.clone()]);
                    before_normalising(query, shared.query_inverses[i], length, d);
                    let (key, d) = (&shared.keys[at.clone()], &mut d_keys[at]);
                    before_normalising(key, shared.key_inverses[i], E::ONE, d);
                }
            },
        );
    }
    sums
}

/// What the forward had of every chunk, for the value heads that a key head serves.
struct Past<E: TensorElement> {
    rows: Range<usize>,
    config: DeltaConfig,
    /// Whether the first chunk's states are not zero.
    begun: bool,
    /// The states before each chunk, `[chunks, group, dk, dv]`.
    states: Buffer<E>,
    /// Of every chunk and then every value head `U`, `[len, dv]`.
    updates: Buffer<E>,
}

impl<E: TensorElement> Past<E> {
    /// Goes forward again. Leaves the last chunk in `shared`.
    fn new(
        source: &Source<'_, E>,
        rows: &Range<usize>,
        head: usize,
        initial: Option<&[E]>,
        shared: &mut Shared<E>,
        own: &mut Own<E>,
    ) -> Self {
        let config = source.config;
        let (of_chunk, chunks) = (config.group() * config.state_len(), rows.len().div_ceil(CHUNK));
        let mut past = Self {
            rows: rows.clone(),
            config,
            begun: initial.is_some(),
            states: Buffer::scratch(chunks * of_chunk),
            updates: Buffer::scratch(rows.len() * config.group() * config.value_head_dim),
        };
        if let Some(initial) = initial.filter(|_| chunks > 0) {
            past.states[..of_chunk].copy_from_slice(initial);
        }
        for chunk in chunks_of(rows) {
            shared.load(source, &chunk, head);
            let begun = past.begun_at(&chunk);
            for (at, value_head) in config.served(head).enumerate() {
                let (state, updates) = (past.state_at(&chunk, at), past.updates_at(&chunk, at));
                let (states, later) = past.states.split_at_mut(state.end);
                let (before, updates) = (&states[state], &mut past.updates[updates]);
                own.load(source, shared, value_head);
                own.updates(source, shared, value_head, begun.then_some(before), updates);
                if chunk.end < rows.end {
                    let next = &mut later[of_chunk - config.state_len()..][..config.state_len()];
                    if begun {
                        next.copy_from_slice(before);
                    }
                    own.carry(shared, updates, next, begun);
                }
            }
        }
        past
    }

    fn begun_at(&self, chunk: &Range<usize>) -> bool {
        self.begun || chunk.start > self.rows.start
    }

    fn state_at(&self, chunk: &Range<usize>, at: usize) -> Range<usize> {
        let index = (chunk.start - self.rows.start) / CHUNK * self.config.group() + at;
        index * self.config.state_len()..(index + 1) * self.config.state_len()
    }

    fn updates_at(&self, chunk: &Range<usize>, at: usize) -> Range<usize> {
        let before = (chunk.start - self.rows.start) * self.config.group() + at * chunk.len();
        let width = self.config.value_head_dim;
        before * width..(before + chunk.len()) * width
    }

    /// `S₀` of a chunk for the `at`-th value head, if it is not zero.
    fn before(&self, chunk: &Range<usize>, at: usize) -> Option<&[E]> {
        self.begun_at(chunk).then(|| &self.states[self.state_at(chunk, at)])
    }

    /// `U` of a chunk for the `at`-th value head.
    fn updates(&self, chunk: &Range<usize>, at: usize) -> &[E] {
        &self.updates[self.updates_at(chunk, at)]
    }
}

/// What the backward of one value head in a chunk goes by.
struct Given<'a, E: TensorElement> {
    shared: &'a Shared<E>,
    /// `U`, `[len, dv]`.
    updates: &'a [E],
    /// `dO`, `[len, dv]`.
    gradient: Mat<'a, E>,
    /// `S₀`, if it is not zero.
    before: Option<&'a [E]>,
}

/// Gradients of one value head in a chunk.
struct Back<E: TensorElement> {
    /// `dv`.
    width: usize,
    /// `dU`, then `dR`: `[len, dv]`.
    d_updates: Buffer<E>,
    /// `dP`, then `N`: `[len, len]`.
    d_scores: Buffer<E>,
    /// `−dA`, then `M + Mᵀ`: `[len, len]`.
    d_coupling: Buffer<E>,
    /// Gradients of the logarithms of `D`, below the diagonal: `[len, len]`.
    d_between: Buffer<E>,
    /// Gradients of the logarithms of `γ`.
    d_kept: [E; CHUNK],
    d_beta: [E; CHUNK],
}

impl<E: TensorElement> Back<E> {
    fn new(config: &DeltaConfig, rows: usize) -> Self {
        let most = rows.min(CHUNK);
        let square = || Buffer::scratch(most * most);
        Self {
            width: config.value_head_dim,
            d_updates: Buffer::scratch(most * config.value_head_dim),
            d_scores: square(),
            d_coupling: square(),
            d_between: square(),
            d_kept: [E::ZERO; CHUNK],
            d_beta: [E::ZERO; CHUNK],
        }
    }

    /// Computes `dR`, given `dS` unless that is zero.
    fn updates(&mut self, own: &mut Own<E>, given: &Given<'_, E>, d_state: Option<&[E]>) {
        let (len, width, dim) = (given.shared.len(), self.width, given.shared.dim);
        own.score(given.shared);
        let mut write = Write::Set;
        if let Some(d_state) = d_state {
            own.keep_keys_to_end(given.shared);
            let out = MatMut::new(&mut self.d_updates, len, width);
            product(out, Mat::new(&own.along, len, dim), Mat::new(d_state, dim, width), write);
            write = Write::Add;
        }
        let out = MatMut::new(&mut self.d_updates, len, width);
        product(out, Mat::new(&own.scores, len, len).t(), given.gradient, write);
        solve_transposed(&own.coupling, len, &mut self.d_updates, width);
    }

    /// Computes `N`, `M + Mᵀ`, and what they mean for `β` and `D`.
    fn products(&mut self, own: &Own<E>, given: &Given<'_, E>) {
        let (len, width) = (given.shared.len(), self.width);
        let updates = Mat::new(given.updates, len, width).t();
        let out = MatMut::new(&mut self.d_scores, len, len);
        product(out, given.gradient, updates, Write::Set);
        let out = MatMut::new(&mut self.d_coupling, len, len);
        product(out, Mat::new(&self.d_updates, len, width), updates, Write::Set);
        vectorize(
            #[inline(always)]
            || {
                for i in 0..len {
                    let below = i * len..i * len + i;
                    let between = &own.between[below.clone()];
                    let scores = &own.scores[below.clone()];
                    let key_products = &given.shared.key_products[below.clone()];
                    let d_scores = &mut self.d_scores[below.clone()];
                    let d_coupling = &mut self.d_coupling[below.clone()];
                    let d_between = &mut self.d_between[below];
                    for (d, &between) in d_coupling.iter_mut().zip(between) {
                        *d = -*d * between;
                    }
                    let beta = own.beta[i];
                    self.d_beta[i] = simd::dot(d_coupling, key_products);
                    for j in 0..i {
                        d_coupling[j] *= beta;
                        d_between[j] = d_scores[j] * scores[j] + d_coupling[j] * key_products[j];
                        d_scores[j] *= between[j];
                    }
                }
            },
        );
        for i in 0..len {
            self.d_scores[i * len + i + 1..(i + 1) * len].fill(E::ZERO);
            self.d_coupling[i * len + i] = E::ZERO;
            for j in 0..i {
                self.d_coupling[j * len + i] = self.d_coupling[i * len + j];
            }
        }
    }

    /// Adds what goes through the products within the chunk.
    fn keys_and_queries(&self, given: &Given<'_, E>, d_queries: &mut [E], d_keys: &mut [E]) {
        let (shared, len) = (given.shared, given.shared.len());
        let scores = Mat::new(&self.d_scores, len, len);
        let out = MatMut::new(d_queries, len, shared.dim);
        product(out, scores, shared.keys(), Write::Add);
        let out = MatMut::new(d_keys, len, shared.dim);
        product(out, scores.t(), shared.queries(), Write::Add);
        let out = MatMut::new(d_keys, len, shared.dim);
        product(out, Mat::new(&self.d_coupling, len, len), shared.keys(), Write::Add);
    }

    /// Adds what goes through the states before and after the chunk, given `dS` unless that is zero.
    fn states(
        &mut self,
        own: &mut Own<E>,
        given: &Given<'_, E>,
        d_state: Option<&[E]>,
        d_queries: &mut [E],
        d_keys: &mut [E],
    ) {
        let (shared, width) = (given.shared, self.width);
        let (len, dim) = (shared.len(), shared.dim);
        let last = len - 1;
        self.d_kept[..len].fill(E::ZERO);
        if let Some(d_state) = d_state {
            let updates = Mat::new(given.updates, len, width);
            let out = MatMut::new(&mut own.along, len, dim);
            product(out, updates, Mat::new(d_state, dim, width).t(), Write::Set);
            let kept = &own.between[last * len..][..len];
            let d_between = &mut self.d_between[last * len..][..len];
            add_along(kept, &own.along, &shared.keys, d_keys, dim, |j, product| {
                // What the last token itself writes has not decayed.
                if j < last {
                    d_between[j] += kept[j] * product;
                }
            });
        }
        let Some(before) = given.before else { return };
        let state = Mat::new(before, dim, width).t();
        product(MatMut::new(&mut own.along, len, dim), given.gradient, state, Write::Set);
        let (kept, beta) = (&own.kept[..len], &own.beta[..len]);
        let d_kept = &mut self.d_kept;
        add_along(kept, &own.along, &shared.queries, d_queries, dim, |i, product| {
            d_kept[i] = kept[i] * product;
        });
        let updates = Mat::new(&self.d_updates, len, width);
        product(MatMut::new(&mut own.along, len, dim), updates, state, Write::Set);
        let mut factors = [E::ZERO; CHUNK];
        for i in 0..len {
            factors[i] = -beta[i] * kept[i];
        }
        let d_beta = &mut self.d_beta;
        add_along(&factors[..len], &own.along, &shared.keys, d_keys, dim, |i, product| {
            d_kept[i] += factors[i] * product;
            d_beta[i] -= kept[i] * product;
        });
        if let Some(d_state) = d_state {
            let along = vectorize(
                #[inline(always)]
                || simd::dot(d_state, before),
            );
            self.d_kept[last] += kept[last] * along;
        }
    }

    /// Writes token `i`'s part of `dV` and returns that of `dβ`.
    fn value(&self, own: &Own<E>, i: usize, value: &[E], d_value: &mut [E]) -> E {
        let d_update = &self.d_updates[i * self.width..][..self.width];
        let beta = own.beta[i];
        vectorize(
            #[inline(always)]
            || {
                for (out, &d) in d_value.iter_mut().zip(d_update) {
                    *out = beta * d;
                }
                self.d_beta[i] + simd::dot(d_update, value)
            },
        )
    }

    /// Writes the gradient of every `g`: of the logarithms of all `γ_i` and `D_ij` that it is a term of.
    fn decay<'a>(
        &self,
        len: usize,
        out: impl DoubleEndedIterator<Item = &'a mut E> + ExactSizeIterator,
    ) {
        let (mut of_kept, mut columns) = (E::ZERO, [E::ZERO; CHUNK]);
        vectorize(
            #[inline(always)]
            || {
                for (s, out) in out.take(len).enumerate().rev() {
                    of_kept += self.d_kept[s];
                    let row = &self.d_between[s * len..][..s];
                    for (column, &d) in columns.iter_mut().zip(row) {
                        *column += d;
                    }
                    *out = of_kept + simd::sum_map(&columns[..s], |x| x);
                }
            },
        );
    }

    /// Turns `dS` after the chunk, zero unless it is `followed` by another, into that before it.
    fn carry(&self, own: &mut Own<E>, given: &Given<'_, E>, d_state: &mut [E], followed: bool) {
        let (shared, width) = (given.shared, self.width);
        let (len, dim) = (shared.len(), shared.dim);
        if followed {
            scale(own.kept[len - 1], d_state);
        }
        let queries = &shared.queries[..len * dim];
        scale_rows(own.kept.into_iter(), queries, &mut own.along, dim);
        product(
            MatMut::new(d_state, dim, width),
            Mat::new(&own.along, len, dim).t(),
            given.gradient,
            if followed { Write::Add } else { Write::Set },
        );
        let factors = own.kept.into_iter().zip(own.beta).map(|(kept, beta)| -(beta * kept));
        scale_rows(factors, &shared.keys[..len * dim], &mut own.along, dim);
        product(
            MatMut::new(d_state, dim, width),
            Mat::new(&own.along, len, dim).t(),
            Mat::new(&self.d_updates, len, width),
            Write::Add,
        );
    }
}

/// For every row: `out += factor · along`, and `visit(row, along · rows)`.
fn add_along<E: Element>(
    factors: &[E],
    along: &[E],
    rows: &[E],
    out: &mut [E],
    cols: usize,
    mut visit: impl FnMut(usize, E),
) {
    vectorize(
        #[inline(always)]
        || {
            let rows = rows.chunks_exact(cols).zip(out.chunks_exact_mut(cols));
            let rows = along.chunks_exact(cols).zip(rows);
            for (i, (&factor, (along, (row, out)))) in factors.iter().zip(rows).enumerate() {
                simd::axpy(factor, along, out);
                visit(i, simd::dot(along, row));
            }
        },
    );
}
