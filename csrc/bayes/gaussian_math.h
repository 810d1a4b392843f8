// The maths of a Gaussian weight: Box-Muller normals, softplus and its relatives, for any ρ, in explicit fma.
//
// Written once for vectors and scalars, CPU and CUDA: every function is a template over Ops, which supplies the types
// F (float), I (int32), U (uint32) and the few operations that the ordinary operators lack. The includer sets
//   FW_MATH            how a function is declared (always inline; __host__ __device__)
//   FW_MATH_NAMESPACE  where it goes
// and may include this file several times, once per instruction set. With fma, a correctly rounded sqrt and no
// contraction by the compiler, the results have the same bits everywhere.
#if !defined(FW_MATH) || !defined(FW_MATH_NAMESPACE)
#error "define FW_MATH and FW_MATH_NAMESPACE before including bayes/gaussian_math.h"
#endif

namespace FW_MATH_NAMESPACE {

// u = 2^exponent m with m in [√½, √2), for normal floats u > 0; returns m.
template <class Ops>
FW_MATH typename Ops::F scaled_apart(typename Ops::F u, typename Ops::I& exponent) {
  const typename Ops::I bits = Ops::bits(u);
  exponent = (bits - 0x3f3504f3) >> 23;
  return Ops::from_bits(bits - (exponent << 23));
}

// -2 ln(u) for normal floats u > 0: u = 2^e (1 + f) with 1 + f in [√½, √2); relative error of f's polynomial 3e-8.
template <class Ops>
FW_MATH typename Ops::F minus_two_log(typename Ops::F u) {
  using F = typename Ops::F;
  using I = typename Ops::I;
  I exponent;
  const F f = scaled_apart<Ops>(u, exponent) - 1.0f;
  F p = Ops::constant(-1.744469851e-01f);
  p = Ops::fma(p, f, Ops::constant(2.873367965e-01f));
  p = Ops::fma(p, f, Ops::constant(-2.990453541e-01f));
  p = Ops::fma(p, f, Ops::constant(3.312478662e-01f));
  p = Ops::fma(p, f, Ops::constant(-3.991366625e-01f));
  p = Ops::fma(p, f, Ops::constant(5.000414848e-01f));
  p = Ops::fma(p, f, Ops::constant(-6.666837335e-01f));
  p = Ops::fma(p, f, Ops::constant(9.999997616e-01f));
  p = Ops::fma(p, f, Ops::constant(-2.0f));
  return Ops::fma(Ops::to_float(exponent), Ops::constant(-1.386294361e+00f), p * f);
}

// Two random words -> two independent normals: √(-2 ln u) (cos θ, sin θ), and θ = (π/2)(q + f): q the top two bits of y
// and f in [-½, ½) its other thirty, as a signed number of quarter turns. |normal| <= 6.77, off by 8 · 2^-24 of itself
// at most (tests/bayes_summands.py).
//
// u in [2^-33, 1] is (x + ½) / 2³² as float32 has it, by definition: x is rounded to 24 bits, then the sum. Where u is
// small it keeps its digits, so the tail reaches further than from 24 equally spaced bits; near 1, it is a multiple of
// 2^-24.
template <class Ops>
FW_MATH void box_muller(typename Ops::U x, typename Ops::U y, typename Ops::F& first, typename Ops::F& second) {
  using F = typename Ops::F;
  using I = typename Ops::I;
  const F u = Ops::fma(Ops::unsigned_to_float(x), Ops::constant(0x1p-32f), Ops::constant(0x1p-33f));
  const F radius = Ops::sqrt(minus_two_log<Ops>(u));
  const F f = Ops::to_float(Ops::to_signed(y << 2)) * 0x1p-32f;
  const F z = f * f;
  F s = Ops::constant(-4.601657856e-03f);
  s = Ops::fma(s, z, Ops::constant(7.968003303e-02f));
  s = Ops::fma(s, z, Ops::constant(-6.459634900e-01f));
  s = Ops::fma(s, z, Ops::constant(1.570796371e+00f)) * f;
  F c = Ops::constant(9.048423381e-04f);
  c = Ops::fma(c, z, Ops::constant(-2.086070366e-02f));
  c = Ops::fma(c, z, Ops::constant(2.536693215e-01f));
  c = Ops::fma(c, z, Ops::constant(-1.233700514e+00f));
  c = Ops::fma(c, z, Ops::constant(1.0f));
  // Quadrants 0..3 turn (c, s) to (c, s), (-s, c), (-c, -s), (s, -c).
  const I quadrant = Ops::to_signed(y);
  const I odd = (quadrant << 1) >> 31;  // all ones in quadrants 1 and 3
  const F cosine = Ops::select(odd, s, c);
  const F sine = Ops::select(odd, c, s);
  const I sine_sign = quadrant & static_cast<int32_t>(0x80000000u);
  const I cosine_sign = (quadrant ^ (quadrant << 1)) & static_cast<int32_t>(0x80000000u);
  first = radius * Ops::from_bits(Ops::bits(cosine) ^ cosine_sign);
  second = radius * Ops::from_bits(Ops::bits(sine) ^ sine_sign);
}

// exp(-|ρ|), 0 below 2^-126.
template <class Ops>
FW_MATH typename Ops::F exp_minus_abs(typename Ops::F rho) {
  using F = typename Ops::F;
  const F t = Ops::from_bits(Ops::bits(rho) | static_cast<int32_t>(0x80000000u));  // -|ρ|
  const F clamped = Ops::select(Ops::less(t, Ops::constant(-87.3f)), Ops::constant(-87.3f), t);
  // Adding 1.5 * 2^23 rounds to the nearest integer, which stands in the low bits of the sum.
  const F shifted = Ops::fma(clamped, Ops::constant(1.442695041e+00f), Ops::constant(0x1.8p23f));
  const F n = shifted - 0x1.8p23f;
  // r = t log2(e) - n, in two pieces of log2(e).
  const F r =
      Ops::fma(clamped, Ops::constant(1.925963033e-08f), Ops::fma(clamped, Ops::constant(1.442695022e+00f), -n));
  F p = Ops::constant(1.547627908e-04f);
  p = Ops::fma(p, r, Ops::constant(1.340023475e-03f));
  p = Ops::fma(p, r, Ops::constant(9.618003853e-03f));
  p = Ops::fma(p, r, Ops::constant(5.550327897e-02f));
  p = Ops::fma(p, r, Ops::constant(2.402265072e-01f));
  p = Ops::fma(p, r, Ops::constant(6.931471825e-01f));
  p = Ops::fma(p, r, Ops::constant(1.0f));
  const F power = Ops::from_bits((Ops::bits(shifted) << 23) + 0x3f800000);
  return Ops::select(Ops::less(t, Ops::constant(-87.3f)), Ops::constant(0.0f), p * power);
}

// σ = softplus(ρ) and its relatives from e = exp(-|ρ|) and s, where σ = e s for ρ < 0 and σ = s for ρ >= 0:
//   log σ = min(ρ, 0) + log s      σ' = (ρ < 0 ? e : 1) / (1 + e)      σ'/σ = 1 / ((1 + e) s)
// s >= ln 2 always, so nothing divides by σ or takes its log: finite where σ itself has rounded to 0.
template <class Ops>
struct Softplus {
  using F = typename Ops::F;
  F e, s, sigma;
  typename Ops::I negative;

  FW_MATH explicit Softplus(F rho) {
    e = exp_minus_abs<Ops>(rho);
    negative = Ops::less(rho, Ops::constant(0.0f));
    // log1p(e) / e = 1 + e Q(e) on [0, 1]; relative error 5e-9.
    F q = Ops::constant(-3.328212537e-03f);
    q = Ops::fma(q, e, Ops::constant(2.025004290e-02f));
    q = Ops::fma(q, e, Ops::constant(-5.775335431e-02f));
    q = Ops::fma(q, e, Ops::constant(1.069000140e-01f));
    q = Ops::fma(q, e, Ops::constant(-1.536129713e-01f));
    q = Ops::fma(q, e, Ops::constant(1.969759166e-01f));
    q = Ops::fma(q, e, Ops::constant(-2.495905012e-01f));
    q = Ops::fma(q, e, Ops::constant(3.333055973e-01f));
    q = Ops::fma(q, e, Ops::constant(-4.999993443e-01f));
    q = Ops::fma(q, e, Ops::constant(1.0f));
    s = Ops::select(negative, q, Ops::fma(q, e, rho));
    sigma = Ops::select(negative, q * e, s);
  }

  FW_MATH F log_sigma(F rho) const {
    return Ops::fma(minus_two_log<Ops>(s), Ops::constant(-0.5f), Ops::select(negative, rho, Ops::constant(0.0f)));
  }
  // σ'/σ, and σ' from it: one division for both.
  FW_MATH F derivative_over_sigma() const { return 1.0f / ((1.0f + e) * s); }
  FW_MATH F derivative(F over_sigma) const {
    const F gate = over_sigma * s;
    return Ops::select(negative, e * gate, gate);
  }
};

}  // namespace FW_MATH_NAMESPACE
