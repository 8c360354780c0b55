//! Rounding to given scales: MLX's packing order, values that are on the grid, and never worse than MLX's own rounding.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use graft_ops::{Array, Dtype};
use graft_quant::{Grid, Levels, Packed, round, round_nearest};

fn weights(seed: u64) -> Array {
    let key = mlx_rs::random::key(seed).unwrap();
    mlx_rs::random::normal::<f32>(&[16, 256], None, None, &key).unwrap()
}

fn error(w: &Array, packed: &Packed) -> f32 {
    let gap = w.subtract(packed.dequantize(Dtype::Float32).unwrap()).unwrap();
    gap.square().unwrap().sum(false).unwrap().item_cast::<f32>()
}

fn bytes(array: &Array) -> Vec<u8> {
    graft_quant::Tensor::from_array(array).unwrap().data
}

#[test]
fn values_on_a_grid_keep_their_codes_at_every_width() {
    graft_testkit::mlx(|| {
        for bits in Grid::BITS {
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
                let grid = Grid::affine(bits, 64);
                let old = round(&weights(1).as_dtype(dtype).unwrap(), grid, None).unwrap();
                let w = old.dequantize(Dtype::Float32).unwrap();
                let levels = Levels::from(&old);
                let fresh = Levels::fresh(&w, grid, dtype).unwrap();
                let new = round_nearest(&w, grid, &[levels, fresh]).unwrap();
                assert_eq!(bytes(&new.codes), bytes(&old.codes), "{bits} bits");
                assert_eq!(bytes(&new.scales), bytes(&old.scales), "{bits} bits");
                // The finer grid holds each value too.
                let eight = Grid { bits: 8, ..grid };
                let finer =
                    round_nearest(&w, eight, &[Levels::finer(&old, 8, dtype).unwrap().unwrap()]).unwrap();
                assert!(
                    error(&w, &finer) <= 1e-9 * w.square().unwrap().sum(false).unwrap().item_cast::<f32>()
                );
            }
        }
    });
}

#[test]
fn fresh_levels_are_those_of_mlx_to_the_bit() {
    graft_testkit::mlx(|| {
        // Groups of either sign, of one number, of zeros, and as MLX meets them in a model.
        let rows = [
            weights(4),
            weights(5).abs().unwrap(),
            mlx_rs::ops::minimum(weights(6), Array::from_f32(-0.1)).unwrap(),
        ];
        let still =
            Array::from_iter((0..16 * 256).map(|i| if i / 256 % 2 == 0 { 0.0 } else { 0.25f32 }), &[16, 256]);
        let rows = rows.iter().chain([&still]).cloned().collect::<Vec<_>>();
        let w = mlx_rs::ops::concatenate(&rows, 0).unwrap();
        for bits in Grid::BITS {
            for (group_size, dtype) in [(32, Dtype::Float32), (64, Dtype::Float16), (128, Dtype::Bfloat16)] {
                let grid = Grid::affine(bits, group_size);
                let plain = round(&w, grid, None).unwrap();
                let fresh = Levels::fresh(&w, grid, dtype).unwrap();
                let both = |of: Levels| [of.scales, of.biases.unwrap()];
                for (ours, own) in both(fresh).iter().zip(both(Levels::from(&plain))) {
                    assert_eq!(bytes(ours), bytes(&own.as_dtype(dtype).unwrap()), "{grid}, {dtype:?}");
                }
            }
        }
    });
}

#[test]
fn never_worse_than_mlx() {
    graft_testkit::mlx(|| {
        for bits in Grid::BITS {
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
                let grid = Grid::affine(bits, 32);
                let w = weights(2);
                let stored = |a: Array| a.as_dtype(dtype).unwrap();
                let plain = round(&w, grid, None).unwrap();
                let plain =
                    Packed { scales: stored(plain.scales), biases: plain.biases.map(stored), ..plain };
                let ours = round_nearest(&w, grid, &[Levels::fresh(&w, grid, dtype).unwrap()]).unwrap();
                assert_eq!(ours.scales.dtype(), dtype);
                let (ours, plain) = (error(&w, &ours), error(&w, &plain));
                assert!(ours <= plain * (1.0 + 1e-5), "{bits} bits, {dtype:?}: {ours} and {plain}");
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    graft_testkit::mlx(|| {
        let w = weights(3);
        let grid = Grid::affine(4, 64);
        assert!(round_nearest(&w, grid, &[]).is_err());
        assert!(round_nearest(&w, Grid { bits: 7, ..grid }, &[]).is_err());
        let narrow = w.reshape(&[128, 32]).unwrap();
        assert!(round_nearest(&narrow, grid, &[]).unwrap_err().to_string().contains("groups of 64"));
    });
}
