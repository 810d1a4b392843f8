// The fused pair of products on the CPU: tiles of rows, their intermediates, and the slots of the gradients.
#include "tt/halves.h"

#include <algorithm>

#include "common/parallel.h"
#include "tt/product.h"
#include "tt/workspace.h"

namespace finite_width::tt {
namespace {

constexpr int64_t kTile = 32 * 1024;  // values of one intermediate in a tile: 128 KiB in float32
constexpr int64_t kMostRows = 64;     // rows of a tile
constexpr int64_t kFewTiles = 8;      // below, each product is cut over the threads instead of the rows
constexpr int64_t kMostSlots = 16;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A tile: whole rows of the batch, or a range of s within one row where one row's intermediate exceeds a tile.
struct Grid {
  int64_t rows;    // of the batch in one tile
  int64_t tiles;   // of the batch
  int64_t blocks;  // of s in one tile
  int64_t block;   // values of s in a block

  Grid(const Sizes& n, int64_t batch) {
    const int64_t row = n.s * n.r * n.j;
    rows = std::clamp<int64_t>(kTile / std::max<int64_t>(row, 1), 1, kMostRows);
    tiles = divide_up(batch, rows);
    blocks = rows > 1 ? 1 : std::clamp<int64_t>(divide_up(row, kTile), 1, n.s);
    block = divide_up(n.s, blocks);
    blocks = divide_up(n.s, block);
  }
};

// What the products below see: `count` rows of the batch from u and v on, s from `from` on for `s` values.
template <class T>
struct Part {
  const Sizes& n;
  const Halves<T>& h;
  int64_t count, from, s;

  int64_t rj() const { return n.r * n.j; }
  int64_t sr() const { return s * n.r; }

  // T [count, (s r), j] from u: one product for all rows, since the rows (b s) of u are adjacent.
  Product<T> make_t(const T* u, T* t) const {
    return {count * s, rj(), n.q, u + from * n.q, n.q, 1, h.b, rj(), t, rj()};
  }

  // V_b [i, j] += A T_b, or from the bias, or from nothing.
  template <class Run>
  void up(const Run& run, const T* t, const T* bias, bool accumulate, T* v) const {
    if (n.j == 1) {
      Product<T> p{count, n.i, sr(), t, sr(), 1, h.a_transposed + from * n.r * n.i, n.i, v, n.i};
      p.init = accumulate ? v : bias;
      p.init_row = accumulate ? n.i : 0;
      return run(p);
    }
    for (int64_t b = 0; b < count; ++b) {
      T* result = v + b * n.v();
      Product<T> p{n.i, n.j, sr(), h.a + from * n.r, n.s * n.r, 1, t + b * sr() * n.j, n.j, result, n.j};
      p.init = accumulate ? result : bias;
      p.init_row = n.j;
      run(p);
    }
  }

  // D [count, (s r), j] from v.
  template <class Run>
  void make_d(const Run& run, const T* v, T* d) const {
    if (n.j == 1) return run(Product<T>{count, sr(), n.i, v, n.i, 1, h.a + from * n.r, n.s * n.r, d, sr()});
    for (int64_t b = 0; b < count; ++b) {
      run(Product<T>{sr(), n.j, n.i, h.a + from * n.r, 1, n.s * n.r, v + b * n.v(), n.j, d + b * sr() * n.j, n.j});
    }
  }

  // U [(b s), q] = D Bᵀ, plus the bias [(s q)].
  template <class Run>
  void down(const Run& run, const T* d, const T* bias, T* u) const {
    if (!bias) return run(Product<T>{count * s, n.q, rj(), d, rj(), 1, h.b_transposed, n.q, u + from * n.q, n.q});
    for (int64_t b = 0; b < count; ++b) {
      T* result = u + b * n.u() + from * n.q;
      run(Product<T>{s, n.q, rj(), d + b * s * rj(), rj(), 1, h.b_transposed, n.q, result, n.q, bias + from * n.q,
                     n.q});
    }
  }

  // a_gradient [(s r), i] (+)= sum_b T_b V_bᵀ; vt holds the panels of V_bᵀ for each row.
  // Where j = 1, [i, (s r)]: one product whose inner index is the row.
  template <class Run>
  void a_gradient(const Run& run, const T* t, const T* vt, bool accumulate, T* result) const {
    if (n.j == 1) {
      result += from * n.r;
      Product<T> p{n.i, sr(), count, vt, 1, n.i, t, sr(), result, n.s * n.r};
      if (accumulate) p.init = result, p.init_row = n.s * n.r;
      return run(p);
    }
    result += from * n.r * n.i;
    const int64_t width = panel_width<T>(), size = panels_size<T>(n.i, n.j);
    for (int64_t i = 0; i < n.i; i += width) {
      Product<T> p{sr(), std::min(width, n.i - i), n.j, t, n.j, 1, vt + i * n.j, width, result + i, n.i};
      if (accumulate) p.init = result + i, p.init_row = n.i;
      p.outer = count, p.a_outer = sr() * n.j, p.b_outer = size;
      run(p);
    }
  }

  // b_gradient [q, (r j)] (+)= sum_(b s) U D.
  Product<T> b_gradient(const T* u, const T* d, bool accumulate, T* result) const {
    Product<T> p{n.q, rj(), count * s, u + from * n.q, 1, n.q, d, rj(), result, rj()};
    if (accumulate) p.init = result, p.init_row = rj();
    return p;
  }
};

constexpr auto serial = [](const auto& product) { run(product); };
constexpr auto threaded = [](const auto& product) { run_parallel(product); };

// The panels of V_bᵀ for each of `count` rows; V itself where V_b has one column.
template <class T>
const T* transposed(const Sizes& n, int64_t count, const T* v) {
  if (n.j == 1) return v;
  const int64_t size = panels_size<T>(n.i, n.j);
  T* to = scratch<T>(Piece::tile_v, count * size + kPanelSlack);
  for (int64_t b = 0; b < count; ++b) transpose_panels(n.i, n.j, v + b * n.v(), to + b * size);
  return to;
}

}  // namespace

template <class T>
void halves_up(const Sizes& n, int64_t batch, const Halves<T>& h, const T* u, const T* bias, T* v) {
  const Grid grid(n, batch);
  const int64_t row = n.s * n.r * n.j;
  if (grid.tiles < kFewTiles) {  // the blocks of a row add to one result: they cannot go to different threads
    T* t = scratch<T>(Piece::tile_t, batch * row);
    const Part<T> all{n, h, batch, 0, n.s};
    run_parallel(all.make_t(u, t));
    return all.up(threaded, t, bias, false, v);
  }
  parallel_blocks(grid.tiles, [&](int64_t tile) {
    const int64_t first = tile * grid.rows, count = std::min(grid.rows, batch - first);
    T* t = scratch<T>(Piece::tile_t, count * grid.block * n.r * n.j);
    for (int64_t from = 0; from < n.s; from += grid.block) {
      const Part<T> part{n, h, count, from, std::min(grid.block, n.s - from)};
      run(part.make_t(u + first * n.u(), t));
      part.up(serial, t, bias, from > 0, v + first * n.v());
    }
  });
}

template <class T>
void halves_down(const Sizes& n, int64_t batch, const Halves<T>& h, const T* v, const T* bias, T* u) {
  const Grid grid(n, batch);
  const int64_t row = n.s * n.r * n.j;
  if (grid.tiles * grid.blocks < kFewTiles) {
    T* d = scratch<T>(Piece::tile_d, batch * row);
    const Part<T> all{n, h, batch, 0, n.s};
    all.make_d(threaded, v, d);
    return all.down(threaded, d, bias, u);
  }
  parallel_blocks(grid.tiles * grid.blocks, [&](int64_t block) {
    const int64_t first = block / grid.blocks * grid.rows, count = std::min(grid.rows, batch - first);
    const int64_t from = block % grid.blocks * grid.block;
    const Part<T> part{n, h, count, from, std::min(grid.block, n.s - from)};
    T* d = scratch<T>(Piece::tile_d, count * part.s * n.r * n.j);
    part.make_d(serial, v + first * n.v(), d);
    part.down(serial, d, bias, u + first * n.u());
  });
}

template <class T>
void halves_gradients(const Sizes& n, int64_t batch, const Halves<T>& h, const T* u, const T* v, T* a_gradient,
                      T* b_gradient, T* up_result, T* down_result) {
  const Grid grid(n, batch);
  const int64_t row = n.s * n.r * n.j, a_size = n.s * n.r * n.i, b_size = n.q * n.r * n.j;
  if (grid.tiles < kFewTiles) {
    T* t = scratch<T>(Piece::tile_t, batch * row);
    T* d = scratch<T>(Piece::tile_d, batch * row);
    const Part<T> all{n, h, batch, 0, n.s};
    run_parallel(all.make_t(u, t));
    all.make_d(threaded, v, d);
    all.a_gradient(threaded, t, transposed(n, batch, v), false, a_gradient);
    run_parallel(all.b_gradient(u, d, false, b_gradient));
    if (up_result) all.up(threaded, t, static_cast<const T*>(nullptr), false, up_result);
    if (down_result) all.down(threaded, d, static_cast<const T*>(nullptr), down_result);
    return;
  }
  // Adding a slot's gradients costs about as much as 64 multiply-adds a value: at most 4 % of a slot's own work.
  const int64_t work = row * (n.q + n.i) * 7 / 2;
  const int64_t least_rows = divide_up(64 * 25 * (a_size + b_size), std::max<int64_t>(work, 1));
  const int64_t slots = std::min(grid.tiles, std::clamp<int64_t>(batch / least_rows, 4, kMostSlots));
  T* sums = scratch<T>(Piece::slots, (slots - 1) * (a_size + b_size));  // the first slot sums in place
  auto a_slot = [&](int64_t slot) { return slot ? sums + (slot - 1) * (a_size + b_size) : a_gradient; };
  auto b_slot = [&](int64_t slot) { return slot ? sums + (slot - 1) * (a_size + b_size) + a_size : b_gradient; };
  parallel_blocks(slots, [&](int64_t slot) {
    const int64_t begin = grid.tiles * slot / slots, end = grid.tiles * (slot + 1) / slots;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * grid.rows, count = std::min(grid.rows, batch - first);
      const T* u_tile = u + first * n.u();
      const T* v_tile = v + first * n.v();
      const T* vt = transposed(n, count, v_tile);
      T* t = scratch<T>(Piece::tile_t, count * grid.block * n.r * n.j);
      T* d = scratch<T>(Piece::tile_d, count * grid.block * n.r * n.j);
      for (int64_t from = 0; from < n.s; from += grid.block) {
        const Part<T> part{n, h, count, from, std::min(grid.block, n.s - from)};
        run(part.make_t(u_tile, t));
        part.a_gradient(serial, t, vt, tile > begin, a_slot(slot));
        if (up_result) part.up(serial, t, static_cast<const T*>(nullptr), from > 0, up_result + first * n.v());
        part.make_d(serial, v_tile, d);
        run(part.b_gradient(u_tile, d, tile > begin || from > 0, b_slot(slot)));
        if (down_result) part.down(serial, d, static_cast<const T*>(nullptr), down_result + first * n.u());
      }
    }
  });
  constexpr int64_t kChunk = 4096;
  auto add = [&](T* sum, int64_t size, int64_t offset) {
    parallel_blocks(divide_up(size, kChunk), [&](int64_t chunk) {
      const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, size);
      for (int64_t slot = 0; slot + 1 < slots; ++slot) {
        const T* part = sums + slot * (a_size + b_size) + offset;
        for (int64_t k = begin; k < end; ++k) sum[k] += part[k];
      }
    });
  };
  add(a_gradient, a_size, 0);
  add(b_gradient, b_size, a_size);
}

#define FW_INSTANTIATE(T)                                                                        \
  template void halves_up<T>(const Sizes&, int64_t, const Halves<T>&, const T*, const T*, T*);   \
  template void halves_down<T>(const Sizes&, int64_t, const Halves<T>&, const T*, const T*, T*); \
  template void halves_gradients<T>(const Sizes&, int64_t, const Halves<T>&, const T*, const T*, T*, T*, T*, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::tt
