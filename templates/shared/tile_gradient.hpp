// Gradients of one block of queries over any list of keys: the backward counterpart of `tiles.hpp`.
//
// Scores are recomputed once from the log-sum-exp and serve all three gradients: with P the probabilities, dP = dO·Vᵀ and
// dS = P ∘ (dP - delta), where delta = rowsum(dO ∘ O) - dLSE,
//
//     dQ = scale · dS·K      dK = scale · dSᵀ·Q      dV = Pᵀ·dO
//
// S, dP and dS lie as in the forward pass, one lane a query. dQ is accumulated transposed, as the output is; dK and dV are
// added to fp32 rows in memory, whose lanes lie along the dimension while the sum runs over the block's queries. Whoever
// calls sees to it that no two threads add to the same rows: there are no atomics, and the order of sums is fixed.
//
// Source: Dao et al., "FlashAttention", NeurIPS 2022, algorithm 4 and appendix B.
#pragma once

#include "tiles.hpp"

namespace sx {

// to[key][lanes] += Σ_query weight[key][query] · rows[query][lanes] for KEYS keys and VECTORS vectors of a dimension.
template <int KEYS, int VECTORS, class Operand>
static void row_block(const Operand* weight, int64_t weight_pitch, const Operand* rows, int64_t rows_pitch, int64_t first,
                      int64_t last, float factor, float* const* to, int64_t column) {
  using V = decltype(broadcast((const Operand*)nullptr));
  vf acc[KEYS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = vf{};
  rows += first * rows_pitch + column;
  for (int64_t x = first; x < last; ++x, rows += rows_pitch) {
    V row[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) row[j] = load_as<V>(rows + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) {
      V w = broadcast(weight + i * weight_pitch + x);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = multiply_add(acc[i][j], row[j], w);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(to[i] + column + j * VL, load(to[i] + column + j * VL) + acc[i][j] * factor);
}

template <class T> class TileGradient {
  using Operand = typename Dtype<T>::Operand;
  static constexpr int PACK = Dtype<T>::pack;

 public:
  TileGradient(Scratch& scratch, int64_t block_q, int64_t head_dim, int64_t v_dim, float scale, const Score& modifier)
      : modifier_(modifier), block_q_(block_q), head_dim_(head_dim), v_dim_(v_dim), scale_(scale),
        // As in TileEngine: a negative scale is taken into q; a zero one must not turn -inf into NaN.
        sign_(scale < 0 ? -1.0f : 1.0f), magnitude_(std::fmax(std::fabs(scale), 1e-30f)) {
    q_pitch_ = padded(head_dim);
    v_pitch_ = padded(v_dim);
    const int64_t rows = STRIP + MAX_KEY_GROUP + 2, dims = q_pitch_ + v_pitch_;
    const int64_t words = 2 * dims * block_q + 2 * dims * block_q + q_pitch_ * block_q + 2 * block_q + 5 * rows * block_q +
                          2 * rows * dims + 2 * block_q;
    char* at = scratch.reserve(words * 4 + 32 * 64);
    auto take = [&](int64_t n) {
      char* p = at;
      at += (n * 4 + 63) / 64 * 64;
      return p;
    };
    qt_ = (Operand*)take(q_pitch_ * block_q);
    dot_ = (Operand*)take(v_pitch_ * block_q);
    q_rows_ = (float*)take(block_q * q_pitch_);
    do_rows_ = (float*)take(block_q * v_pitch_);
    if constexpr (PACK == 2) {
      q_pairs_ = (Operand*)take(block_q * q_pitch_);
      do_pairs_ = (Operand*)take(block_q * v_pitch_);
    }
    dqt_ = (float*)take(q_pitch_ * block_q);
    lse_ = (float*)take(block_q);
    delta_ = (float*)take(block_q);
    unused_ = (float*)take(block_q);
    s_ = (float*)take(rows * block_q);
    dp_ = (float*)take(rows * block_q);
    if constexpr (PACK == 2) {
      p_half_ = (uint16_t*)take(rows * block_q / 2 + 16);
      ds_half_ = (uint16_t*)take(rows * block_q / 2 + 16);
      ds_pairs_ = (Operand*)take(rows * block_q);
    }
    k_rows_ = (float*)take(rows * q_pitch_);
    v_rows_ = (float*)take(rows * v_pitch_);
    if constexpr (PACK == 2) k_pairs_ = (Operand*)take(rows * q_pitch_);
  }

  // Takes up queries: addresses of their rows of q and dO, their log-sum-exp, delta, and places in the sequence.
  template <class Q, class Do, class Lse, class Delta, class Token>
  void begin(int64_t n, Q&& q, Do&& d_out, Lse&& lse, Delta&& delta, Token&& token) {
    if constexpr (HAS_SCORE_MOD)
      for (int64_t i = 0; i < block_q_; ++i) q_tokens_[i / VL][i % VL] = i < n ? (int32_t)token(i) : 0;
    n_ = n;
    vectors_ = (int)((n + VL - 1) / VL);
    for (int64_t i = 0; i < vectors_ * VL; ++i) {
      unpack_row(q_rows_ + i * q_pitch_, i < n ? q(i) : nullptr, head_dim_, q_pitch_);
      unpack_row(do_rows_ + i * v_pitch_, i < n ? d_out(i) : nullptr, v_dim_, v_pitch_);
      // A query without keys has nothing to recompute; lanes beyond the last query weigh nothing.
      const float value = i < n ? lse(i) : -NEG_INF;
      lse_[i] = value == NEG_INF ? 0.0f : value;
      delta_[i] = i < n ? delta(i) : 0.0f;
    }
    pack(qt_, q_rows_, q_pitch_, sign_);
    pack(dot_, do_rows_, v_pitch_, 1.0f);
    if constexpr (PACK == 2) {
      pair_queries(q_pairs_, q_rows_, q_pitch_);
      pair_queries(do_pairs_, do_rows_, v_pitch_);
    }
    std::memset(dqt_, 0, q_pitch_ * block_q_ * 4);
    keys_ = 0;
    masked_ = false;
  }

  // Adds one key, at place `token`, for the queries whose bit is set: its rows of K and V, and the fp32 rows its gradients
  // are added to.
  SX_INLINE void add(const T* k, const T* v, float* dk, float* dv, int64_t token, uint64_t lanes) {
    if constexpr (HAS_SCORE_MOD) kv_tokens_[keys_] = (int32_t)token;
    k_[keys_] = k; v_[keys_] = v; dk_[keys_] = dk; dv_[keys_] = dv; lanes_[keys_] = lanes;
    masked_ |= lanes != ~uint64_t(0);
    if (++keys_ == STRIP) flush();
  }

  // As in TileEngine.
  SX_INLINE void number(TileEdges& tile, uint64_t lanes) {
    edges_.put(keys_, tile.next, block_q_, lanes);
  }
  SX_INLINE void number(const Arguments& a, int64_t column) {
    if constexpr (Score::NEEDS_EDGES)
      edges_.put(keys_, a.gathered_edges + a.gathered_edge_indptr[column], a.gathered_lanes[column]);
  }

  void flush() {
    if (!keys_) return;
    stage();
    n_chunks_ = 0;
    if (masked_) n_chunks_ = find_chunks(chunks_, lanes_, keys_, n_);
    else chunks_[n_chunks_++] = {0, keys_, 0, vectors_};
    for (int c = 0; c < n_chunks_; ++c) {
      const Chunk& chunk = chunks_[c];
      if (masked_ && !HAS_SCORE_MOD) score_chunk<true>(chunk, kp_, qt_, block_q_, depth(head_dim_), lanes_, s_, unused_);
      else score_chunk<false>(chunk, kp_, qt_, block_q_, depth(head_dim_), lanes_, s_, unused_);
      score_chunk<false>(chunk, vp_, dot_, block_q_, depth(v_dim_), lanes_, dp_, unused_);
      differentiate(chunk);
      if constexpr (PACK == 2) add_chunk<PACK>(chunk, k_pair_rows_, ds_pairs_, block_q_, head_dim_, dqt_);
      else add_chunk<PACK>(chunk, kp_, (const Operand*)dp_, block_q_, head_dim_, dqt_);
      if constexpr (PACK == 2) {
        add_rows(chunk, (const Operand*)p_half_, block_q_ / 2, do_pairs_, v_pitch_, v_dim_, 1.0f, dv_);
        add_rows(chunk, (const Operand*)ds_half_, block_q_ / 2, q_pairs_, q_pitch_, head_dim_, scale_, dk_);
      } else {
        add_rows(chunk, (const Operand*)s_, block_q_, (const Operand*)do_rows_, v_pitch_, v_dim_, 1.0f, dv_);
        add_rows(chunk, (const Operand*)dp_, block_q_, (const Operand*)q_rows_, q_pitch_, head_dim_, scale_, dk_);
      }
    }
    keys_ = 0;
    masked_ = false;
  }

  // Leaves dQ of each query, scaled, in fp32 rows: `row(i)`, of a multiple of VL numbers.
  void finish() {
    flush();
    for (int64_t lane = 0; lane < n_; lane += VL)
      for (int64_t c = 0; c < q_pitch_; c += VL) {
        vf columns[VL];
        for (int j = 0; j < VL; ++j) columns[j] = load(dqt_ + (c + j) * block_q_ + lane) * scale_;
        transpose(columns);
        for (int i = 0; i < VL; ++i) store(q_rows_ + (lane + i) * q_pitch_ + c, columns[i]);
      }
  }
  const float* row(int64_t i) const { return q_rows_ + i * q_pitch_; }

 private:
  static int64_t padded(int64_t dim) { return (dim + PACK * VL - 1) / (PACK * VL) * (PACK * VL); }
  static int64_t depth(int64_t dim) { return (dim + PACK - 1) / PACK; }

  static void unpack_row(float* to, const T* from, int64_t dim, int64_t pitch) {
    if (from) widen(to, from, dim);
    for (int64_t x = from ? whole_vectors(dim) : 0; x < pitch; x += VL) store(to + x, vf{});
  }

  // Queries in lanes, times `sign`: [dimension / PACK, block_q].
  void pack(Operand* to, const float* rows, int64_t pitch, float sign) {
    for (int64_t lane = 0; lane < vectors_ * VL; lane += VL)
      for (int64_t x = 0; x < pitch / PACK; x += VL) {
        if constexpr (PACK == 1) {
          vf block[VL];
          for (int i = 0; i < VL; ++i) block[i] = load(rows + (lane + i) * pitch + x) * sign;
          transpose(block);
          for (int j = 0; j < VL; ++j) store((float*)to + (x + j) * block_q_ + lane, block[j]);
        } else {
#if defined(SX_BF16_DOT)
          vu block[VL];
          for (int i = 0; i < VL; ++i) {
            const float* from = rows + (lane + i) * pitch + 2 * x;
            block[i] = (vu)_mm512_cvtne2ps_pbh((__m512)(load(from + VL) * sign), (__m512)(load(from) * sign));
          }
          transpose(block);
          for (int j = 0; j < VL; ++j) std::memcpy(to + (x + j) * block_q_ + lane, &block[j], sizeof(vu));
#endif
        }
      }
  }
  // Neighbouring queries in pairs: [block_q / 2, dimension].
  void pair_queries(Operand* to, const float* rows, int64_t pitch) {
#if defined(SX_BF16_DOT)
    for (int64_t i = 0; i < vectors_ * VL; i += 2)
      for (int64_t x = 0; x < pitch; x += VL) {
        vu pair = pair_bf16(load(rows + i * pitch + x), load(rows + (i + 1) * pitch + x));
        std::memcpy(to + i / 2 * pitch + x, &pair, sizeof pair);
      }
#endif
  }

  void stage() {
    const int keys = keys_;
    for (int i = 0; i < keys; ++i) {
      kp_[i] = staged(k_rows_ + i * q_pitch_, k_[i], head_dim_);
      vp_[i] = staged(v_rows_ + i * v_pitch_, v_[i], v_dim_);
    }
#if defined(SX_BF16_DOT)
    if constexpr (PACK == 2)
      for (int i = 0; i < keys; i += 2) {
        Operand* to = k_pairs_ + i / 2 * q_pitch_;
        sx::pair_rows(to, k_[i], i + 1 < keys ? k_[i + 1] : nullptr, head_dim_);
        k_pair_rows_[i / 2] = to;
      }
#endif
  }
  // A row of K or V as broadcasts read it: in place, or converted, or with the last odd number paired with zero.
  const Operand* staged(float* to, const T* from, int64_t dim) {
    if constexpr (Dtype<T>::in_place) {
      if (PACK == 1 || dim % 2 == 0) return (const Operand*)from;
      std::memcpy(to, from, dim * sizeof(T));
      std::memset((char*)to + dim * sizeof(T), 0, sizeof(T));
    } else {
      widen(to, from, dim);
    }
    return (const Operand*)to;
  }

  // P over S, and dS over dP.
  void differentiate(const Chunk& c) {
    for (int v = c.low; v < c.high; ++v) {
      const vf lse = load(lse_ + v * VL), delta = load(delta_ + v * VL);
      const uint32_t within = n_ - v * VL >= VL ? ALL_LANES : (1u << (n_ - v * VL)) - 1;
      auto both = [&](int i, vf& p, vf& ds) {
        const vf s = load(s_ + i * block_q_ + v * VL);
        const vf d_score = load(dp_ + i * block_q_ + v * VL) - delta;
        if constexpr (HAS_SCORE_MOD) {
          const vf scaled = s * magnitude_;
          const auto edge = edges_.at(i, v);
          const vf modified = modifier_.value(scaled, q_tokens_[v], kv_tokens_[i], edge);
          p = exp2((modified - lse) * LOG2_E);
          const vf d_value = p * d_score;
          ds = sx_chained(d_value, modifier_.slope(scaled, q_tokens_[v], kv_tokens_[i], edge));
          const uint32_t live = (masked_ ? (uint32_t)(lanes_[i] >> (v * VL)) : ALL_LANES) & within;
          if (live != ALL_LANES) {
            p = select_bits(live, p, vf{});
            ds = select_bits(live, ds, vf{});
          }
          modifier_.scatter(d_value, scaled, q_tokens_[v], kv_tokens_[i], edge, live);
        } else {
          // The difference first: of large scores it keeps every digit.
          p = exp2((s * magnitude_ - lse) * LOG2_E);
          ds = p * d_score;
        }
      };
      if constexpr (PACK == 1) {
#pragma GCC unroll 4
        for (int i = c.first; i < c.last; ++i) {
          vf p, ds;
          both(i, p, ds);
          store(s_ + i * block_q_ + v * VL, p);
          store(dp_ + i * block_q_ + v * VL, ds);
        }
      } else {
#if defined(SX_BF16_DOT)
        for (int i = c.first; i < c.last; i += 2) {
          vf p0, ds0, p1{}, ds1{};
          both(i, p0, ds0);
          if (i + 1 < c.last) both(i + 1, p1, ds1);
          vu pair = pair_bf16(ds0, ds1);
          std::memcpy(ds_pairs_ + i / 2 * block_q_ + v * VL, &pair, sizeof pair);
          store_as((bf16*)p_half_ + i * block_q_ + v * VL, p0);
          store_as((bf16*)ds_half_ + i * block_q_ + v * VL, ds0);
          if (i + 1 < c.last) {
            store_as((bf16*)p_half_ + (i + 1) * block_q_ + v * VL, p1);
            store_as((bf16*)ds_half_ + (i + 1) * block_q_ + v * VL, ds1);
          }
        }
#endif
      }
    }
  }

  // to[key] += factor · Σ weight[key][query] · rows[query] over the chunk's live queries; rows of `to` are padded to whole
  // vectors.
  void add_rows(const Chunk& c, const Operand* weight, int64_t weight_pitch, const Operand* rows, int64_t pitch, int64_t dim,
                float factor, float* const* to) {
    const int64_t first = c.low * VL / PACK, last = c.high * VL / PACK;
    for (int64_t column = 0; column < dim; column += BLOCK_VECTORS * VL)
      with_vectors((dim - column + VL - 1) / VL, [&](auto vectors) {
        constexpr int VECTORS = decltype(vectors)::value;
        int i = c.first;
        in_groups<group_of(VECTORS)>(c.last - c.first, [&](auto keys) {
          constexpr int KEYS = decltype(keys)::value;
          row_block<KEYS, VECTORS>(weight + i * weight_pitch, weight_pitch, rows, pitch, first, last, factor, to + i, column);
          i += KEYS;
        });
      });
  }

  const Score& modifier_;
  vi q_tokens_[MAX_BLOCK_Q / VL];
  int32_t kv_tokens_[STRIP];
  StripEdges<STRIP, MAX_BLOCK_Q, Score::NEEDS_EDGES> edges_;
  const int64_t block_q_, head_dim_, v_dim_;
  const float scale_, sign_, magnitude_;
  int64_t q_pitch_, v_pitch_, n_ = 0;
  int vectors_ = 0, keys_ = 0, n_chunks_ = 0;
  bool masked_ = false;
  Operand *qt_, *dot_;               // [dimension / PACK, block_q]
  float *q_rows_, *do_rows_;         // [block_q, dimension]
  Operand *q_pairs_ = nullptr, *do_pairs_ = nullptr;  // [block_q / 2, dimension]
  float* dqt_;                       // [head_dim, block_q]
  float *lse_, *delta_, *unused_;
  float *s_, *dp_;                   // [STRIP, block_q]; P and dS once they are known
  uint16_t *p_half_ = nullptr, *ds_half_ = nullptr;   // [STRIP, block_q]
  Operand* ds_pairs_ = nullptr;      // [STRIP / 2, block_q]
  float *k_rows_, *v_rows_;
  Operand* k_pairs_ = nullptr;
  const T *k_[STRIP], *v_[STRIP];
  float *dk_[STRIP], *dv_[STRIP];
  uint64_t lanes_[STRIP + MAX_KEY_GROUP];
  const Operand *kp_[STRIP + MAX_KEY_GROUP], *vp_[STRIP + MAX_KEY_GROUP], *k_pair_rows_[STRIP];
  Chunk chunks_[STRIP / CHUNK_STEP];
};

}  // namespace sx
