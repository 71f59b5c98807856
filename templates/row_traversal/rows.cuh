// Who takes which row, and the keys of a row: what the forward and the backward pass have in common.
//
// SX_LANES lanes make a team, which fetches one row of K or V together, 16 bytes a lane at a time. Rows come in three
// bins. A short row belongs to one team, so a warp takes several. A middling row belongs to a warp, whose teams take
// its keys in turn. A long row, or a piece of one that was split, belongs to a block.
//
// The backward pass walks the transposed lists with the same words: a "row" is then a key, and its "keys" are queries.
#pragma once
#include "shared/device.cuh"
#include "shared/launch.cuh"
#include "shared/teams.cuh"
// A score modifier is a header that the host generates: Score::value and Score::slope; with SX_SCATTER, what scores add to
// the gradients of its tables. SX_EDGES says that it asks for the numbers of edges.
#if defined(SX_SCORE)
#include "row_traversal/tables.cuh"
#include "score_generated.cuh"
#endif

namespace sx {

enum Form { kOffsets = 0, kRanges = 1, kEdges = 2 };

constexpr int kKeys = SX_KEYS;
constexpr int kWarps = SX_WARPS;

// The index arrays of a launch; the host's side of it is `Lists` in backends/cuda_calls.py.
struct Lists {
  const i64* indptr;       // ranges and edges: [rows + 1]
  const void* first;       // offsets: i64; ranges: int; edges: the keys, int
  const void* last;
  const void* step;
  const int* row_order;    // position -> token, or null
  const int* key_order;
  const int* batches;      // [batch elements]
  const int* heads;        // [head packs]: the first head of each
  const int* piece_row;    // long rows
  const int* piece_start;  // which of the row's keys: start ... stop - 1
  const int* piece_stop;
  const int* piece_slot;   // where its state goes; -1: the piece is the whole row
  const int* warp_rows;    // middling rows; null: they are warp_first, warp_first + 1, ...
  const int* team_rows;    // short rows, likewise
  const int* merge_row;    // split rows
  const i64* merge_indptr; // their slots
  const int* edges;        // the number of each edge as they are listed; null: edge i is number i
  int n_pieces, n_warp_rows, n_team_rows, warp_first, team_first;
  int n_slots, n_merges, n_heads, abreast, rows_per_warp;
  int n_offsets, row_len, key_len, group;
  int first_query;                 // what a score modifier is told of query 0
  const void* tables[kMaxTables];  // of the score modifier
};

// What a team takes: entries of a bin, one after the other, and of a row's keys every so manyth.
struct Job {
  enum Bin { kPiece, kWarp, kTeam } bin;
  int entry, end, stride, n_rows;  // entries entry, entry + stride, ... before end; n_rows at most
  int offset, turn;                // the first of its keys, and from one of its keys to the next
};

SX_INLINE int warp_blocks(const Lists& lists) { return ceil_div(lists.n_warp_rows, kWarps * lists.rows_per_warp); }
SX_INLINE unsigned n_jobs(const Lists& lists) {
  return lists.n_pieces + warp_blocks(lists) + ceil_div(lists.n_team_rows, kWarps * lists.rows_per_warp * kTeams);
}

SX_INLINE Job job_of(const Lists& lists, int index, int warp, int team) {
  const int rows = lists.rows_per_warp;
  if (index < lists.n_pieces) return {Job::kPiece, index, index + 1, 1, 1, warp * kTeams + team, kWarps * kTeams};
  index -= lists.n_pieces;
  if (index < warp_blocks(lists)) {
    const int entry = (index * kWarps + warp) * rows;
    return {Job::kWarp, entry, lists.n_warp_rows, 1, rows, team, kTeams};
  }
  index -= warp_blocks(lists);
  const int entry = (index * kWarps + warp) * rows * kTeams + team;
  return {Job::kTeam, entry, lists.n_team_rows, kTeams, rows, 0, 1};
}

// The progressions of one row, as one sequence of keys numbered from 0.
struct Progression {
  i64 begin;
  unsigned by, count;
};

SX_INLINE Progression clipped(i64 begin, i64 end, i64 by, int key_len) {
  if (end > key_len) end = key_len;
  if (begin < 0) begin = by == 1 ? 0 : begin + (i64)(((unsigned)-begin + (unsigned)by - 1) / (unsigned)by) * by;
  if (begin >= end) return {0, 1, 0};
  const unsigned span = (unsigned)(end - begin);
  return {begin, (unsigned)by, by == 1 ? span : (span + (unsigned)by - 1) / (unsigned)by};
}

template <int FORM> class Keys {
 public:
  // The keys of an entry of the job's bin; rows beyond the bin have none.
  SX_INLINE void open(const Lists& lists, const Job& job, int entry) {
    row = -1, stop = 0, at_ = 0, trips = 0, full = 0, slot = -1;
    if (entry >= job.end) return;
    int start = 0, limit = 0x7fffffff;
    if (job.bin == Job::kPiece) {
      row = lists.piece_row[entry], slot = lists.piece_slot[entry];
      start = lists.piece_start[entry], limit = lists.piece_stop[entry];
    } else if (job.bin == Job::kWarp) {
      row = lists.warp_rows ? lists.warp_rows[entry] : lists.warp_first + entry;
    } else {
      row = lists.team_rows ? lists.team_rows[entry] : lists.team_first + entry;
    }
    low_ = 0, high_ = lists.n_offsets;
    if constexpr (FORM != kOffsets) low_ = __ldg(lists.indptr + row), high_ = __ldg(lists.indptr + row + 1);
    if constexpr (FORM == kEdges) {
      stop = (int)(high_ - low_);
    } else {
      for (i64 p = low_; p < high_; ++p) stop += (int)progression(lists, p).count;
      passed_ = 0, current_ = low_ < high_ ? progression(lists, low_) : Progression{0, 1, 0};
    }
    stop = min(stop, limit);
    at_ = start + job.offset;
    const int own = ceil_div(max(stop - at_, 0), job.turn);
    trips = ceil_div(own, kKeys), full = own / kKeys;
  }

  // The next kKeys keys: tokens, -1 beyond the last.
  SX_INLINE void advance(const Lists& lists, const Job& job) {
#pragma unroll
    for (int u = 0; u < kKeys; ++u, at_ += job.turn) {
      tokens[u] = -1;
      if (at_ < stop) tokens[u] = position(lists, at_);
#if defined(SX_EDGES)
      numbers[u] = 0;
      if (at_ < stop) numbers[u] = lists.edges ? __ldg(lists.edges + low_ + at_) : (int)(low_ + at_);
#endif
    }
    if (lists.key_order) {
#pragma unroll
      for (int u = 0; u < kKeys; ++u)
        if (tokens[u] >= 0) tokens[u] = __ldg(lists.key_order + tokens[u]);
    }
  }

  int row, stop, slot;
  int trips;  // how often this team takes kKeys keys
  int full;   // and how often so many are left
  int tokens[kKeys];
#if defined(SX_EDGES)
  int numbers[kKeys];  // of their edges
  SX_INLINE int edge(int u) const { return numbers[u]; }
#else
  SX_INLINE int edge(int) const { return 0; }
#endif

 private:
  SX_INLINE Progression progression(const Lists& lists, i64 p) const {
    if constexpr (FORM == kOffsets) {
      const i64 begin = __ldg((const i64*)lists.first + p) + row, end = __ldg((const i64*)lists.last + p) + row;
      return clipped(begin, end, __ldg((const i64*)lists.step + p), lists.key_len);
    } else {
      const int begin = __ldg((const int*)lists.first + p), end = __ldg((const int*)lists.last + p);
      return clipped(begin, end, __ldg((const int*)lists.step + p), lists.key_len);
    }
  }
  // The nth key; n never goes back, and is below the row's degree.
  SX_INLINE int position(const Lists& lists, int n) {
    if constexpr (FORM == kEdges) {
      return __ldg((const int*)lists.first + low_ + n);
    } else {
      while ((unsigned)n >= passed_ + current_.count) {
        passed_ += current_.count;
        current_ = progression(lists, ++low_);
      }
      return (int)(current_.begin + (i64)((unsigned)n - passed_) * current_.by);
    }
  }

  int at_;
  i64 low_, high_;
  unsigned passed_;
  Progression current_;
};

SX_INLINE i64 token_of(const Lists& lists, int row) { return lists.row_order ? lists.row_order[row] : row; }

// The most of all teams: a warp goes round together, since its lanes exchange sums.
SX_INLINE int most_of_teams(int n) {
#pragma unroll
  for (int lane = kLanes; lane < 32; lane *= 2) n = max(n, __shfl_xor_sync(kAllLanes, n, lane));
  return n;
}

SX_INLINE int least_of_teams(int n) {
#pragma unroll
  for (int lane = kLanes; lane < 32; lane *= 2) n = min(n, __shfl_xor_sync(kAllLanes, n, lane));
  return n;
}

}  // namespace sx
