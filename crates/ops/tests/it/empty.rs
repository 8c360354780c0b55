//! Operations on no rows at all, as a batch without answers has: values of size 0 and gradients that are zero.

use graft_ops::{
    Array, Dtype, Head, LinearRef, LowRank, Result, Rows, WeightRef, attention, linear_cross_entropy,
    linears, matmul, matmul_t, rms_norm, swiglu,
};

use crate::packed::Weights;
use crate::support::{every_level, mlx, random, values, with_gradients};

/// All gradients of f(args), whose value is empty, are zeros.
fn gradients_are_zeros(what: &str, args: &[Array], f: impl Fn(&[Array]) -> Result<Array>) {
    every_level(|level| {
        // What MLX keeps for the next array of a size is not zero by chance.
        for arg in args {
            let nothing = mlx_rs::ops::full::<f32>(arg.shape(), Array::from_f32(f32::NAN)).unwrap();
            nothing.eval().unwrap();
        }
        let all = with_gradients(args, &f);
        assert_eq!(all[0].size(), 0, "{what}");
        for (i, (gradient, arg)) in all[1..].iter().zip(args).enumerate() {
            assert_eq!(gradient.shape(), arg.shape(), "{level:?}, {what}, gradient {i}");
            let values = values(gradient);
            assert!(values.iter().all(|x| *x == 0.0), "{level:?}, {what}, gradient {i}: {values:?}");
        }
    });
}

#[test]
fn products() {
    mlx(|| {
        let w = Weights::new(96, 64, 4, 32, Dtype::Float32);
        gradients_are_zeros("packed", &[random(1, &[0, 64])], |x| matmul(&x[0], w.view()));
        gradients_are_zeros("packed, transposed", &[random(1, &[0, 96])], |x| matmul_t(&x[0], w.view()));
        for shape in [&[0, 64][..], &[2, 0, 64]] {
            let args = [random(1, shape), random(2, &[96, 64])];
            gradients_are_zeros("dense", &args, |x| matmul(&x[0], WeightRef::Dense(&x[1])));
        }
        let args = [random(1, &[0, 96]), random(2, &[96, 64])];
        gradients_are_zeros("dense, transposed", &args, |x| matmul_t(&x[0], WeightRef::Dense(&x[1])));
    });
}

#[test]
fn linears_with_updates() {
    mlx(|| {
        let packed = Weights::new(150, 192, 4, 32, Dtype::Float32);
        let dense = random(9, &[150, 192]);
        for (weight, rank) in [(packed.view(), 8), (WeightRef::Dense(&dense), 3), (packed.view(), 130)] {
            let shapes = [&[0, 192][..], &[192, rank], &[rank, 150], &[150], &[0, 192], &[0, 150]];
            let mut args = shapes.map(|shape| random(1, shape));
            // A factor of each kind: usual, small, none.
            let c = (0..150).map(|o| [1.0_f32, 1e-4, 0.0][o % 3]);
            args[3] = Array::from_iter(c, &[150]);
            for own_input in [false, true] {
                gradients_are_zeros("linears", &args, |args| {
                    let [x, a, b, c, input, h] = args else { unreachable!() };
                    let low_rank =
                        LowRank { a, b, scale: 2.0, factor: Some(c), input: own_input.then_some(input) };
                    let part = LinearRef { weight, bias: None, residual: Some(h), low_rank: Some(low_rank) };
                    Ok(linears(x, &[part])?.swap_remove(0))
                });
            }
        }
    });
}

#[test]
fn attention_norm_gate_and_loss() {
    mlx(|| {
        let head = Head { dim: 16, scale: 0.25, rope: None };
        for lengths in [vec![], vec![0], vec![0, 0]] {
            let rows = Rows::new(lengths);
            let args = [random(1, &[0, 64]), random(2, &[0, 32]), random(3, &[0, 32])];
            gradients_are_zeros("attention", &args, |x| attention(&x[0], &x[1], &x[2], &rows, head));
        }
        let args = [random(1, &[0, 96]), random(2, &[96])];
        gradients_are_zeros("norm", &args, |x| rms_norm(&x[0], &x[1], 1e-5));
        let args = [random(1, &[0, 96]), random(2, &[32])];
        gradients_are_zeros("norm by heads", &args, |x| rms_norm(&x[0], &x[1], 1e-5));
        let args = [random(1, &[0, 96]), random(2, &[0, 96])];
        gradients_are_zeros("gate", &args, |x| swiglu(&x[0], &x[1]));
        let (w, none) = (random(1, &[40, 32]), Array::from_slice::<i32>(&[], &[0]));
        gradients_are_zeros("loss", &[random(2, &[0, 32])], |x| {
            linear_cross_entropy(&x[0], WeightRef::Dense(&w), &none, 8)
        });
    });
}
