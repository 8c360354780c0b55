//! Rounding that knows the inputs: exact on a grid, better than plain rounding at the output, and bounded by nothing else.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use graft_ops::{Array, Dtype};
use graft_quant::{Grid, Hessian, Levels, Packed, Tensor, round, round_compensated, round_nearest};

const INPUTS: i32 = 256;

fn normal(shape: &[i32], seed: u64) -> Array {
    let key = mlx_rs::random::key(seed).unwrap();
    mlx_rs::random::normal::<f32>(shape, None, None, &key).unwrap()
}

/// Moments of inputs that go together, as those of a network do: a few directions hold most of them.
fn moments(seed: u64) -> Array {
    let mixed = normal(&[1024, 32], seed).matmul(normal(&[32, INPUTS], seed + 1)).unwrap();
    let x = mixed.add(normal(&[1024, INPUTS], seed + 2)).unwrap();
    x.transpose().unwrap().matmul(&x).unwrap().divide(Array::from_f32(1024.0)).unwrap()
}

fn sum(array: &Array) -> f32 {
    array.sum(false).unwrap().item_cast::<f32>()
}

fn bytes(array: &Array) -> Vec<u8> {
    Tensor::from_array(array).unwrap().data
}

fn levels(packed: &Packed) -> Levels {
    Levels::from(packed)
}

#[test]
fn a_weight_on_its_grid_keeps_every_code_and_a_small_update_survives() {
    graft_testkit::mlx(|| {
        let hessian = Hessian::new(moments(1)).unwrap();
        for bits in [2, 3, 4, 6] {
            let grid = Grid::affine(bits, 64);
            let base = round(&normal(&[48, INPUTS], 7), grid, None).unwrap();
            let w = base.dequantize(Dtype::Float32).unwrap();
            let kept = round_compensated(&w, grid, &levels(&base), &hessian).unwrap();
            assert_eq!(bytes(&kept.codes), bytes(&base.codes), "{bits} bits");
            // A low-rank update of a quarter of a step.
            let step = sum(&base.scales.abs().unwrap()) / base.scales.size() as f32;
            let update = normal(&[48, 4], 8).matmul(normal(&[4, INPUTS], 9)).unwrap();
            let update = update.multiply(Array::from_f32(0.125 * step)).unwrap();
            let target = w.add(&update).unwrap();
            let cost = |packed: &Packed| {
                let error = packed.dequantize(Dtype::Float32).unwrap().subtract(&target).unwrap();
                sum(&hessian.cost(&error).unwrap()) / sum(&hessian.cost(&update).unwrap())
            };
            let ours = cost(&round_compensated(&target, grid, &levels(&base), &hessian).unwrap());
            let plain = cost(&round_nearest(&target, grid, &[levels(&base)]).unwrap());
            let mlx = cost(&round(&target, grid, None).unwrap());
            let ours_on_mlx = cost(&round(&target, grid, Some(&hessian)).unwrap());
            assert!(ours < 0.35 && ours < 0.5 * plain, "{bits} bits: {ours}, plain {plain}");
            assert!(ours_on_mlx < 0.5 * mlx, "{bits} bits: {ours_on_mlx}, MLX {mlx}");
        }
    });
}

#[test]
fn the_cost_is_that_of_the_formula() {
    graft_testkit::mlx(|| {
        let gram = Array::from_slice(&[2.0f32, 1.0, 1.0, 3.0], &[2, 2]);
        let hessian = Hessian::new(gram).unwrap();
        let error = Array::from_slice(&[1.0f32, 0.0, 1.0, -1.0], &[2, 2]);
        let cost = Tensor::from_array(&hessian.cost(&error).unwrap()).unwrap().to_f32().unwrap();
        assert_eq!(cost, [2.0, 3.0]);
    });
}

#[test]
fn moments_that_are_none_are_refused_and_weak_ones_are_damped() {
    graft_testkit::mlx(|| {
        let text = |gram: Array| Hessian::new(gram).unwrap_err().to_string();
        assert!(text(Array::from_slice(&[0f32; 4], &[2, 2])).contains("all zero"));
        assert!(text(Array::from_slice(&[f32::NAN; 4], &[2, 2])).contains("no numbers"));
        assert!(text(Array::from_slice(&[1f32; 6], &[2, 3])).contains("square"));
        // One direction alone: no factor without what is added to the diagonal.
        let x = normal(&[1, INPUTS], 3);
        let hessian = Hessian::new(x.transpose().unwrap().matmul(&x).unwrap()).unwrap();
        let grid = Grid::affine(4, 64);
        let base = round(&normal(&[8, INPUTS], 7), grid, None).unwrap();
        let w = base.dequantize(Dtype::Float32).unwrap();
        let kept = round_compensated(&w, grid, &levels(&base), &hessian).unwrap();
        assert_eq!(bytes(&kept.codes), bytes(&base.codes));
        let narrow = normal(&[8, 128], 7);
        let error = round_compensated(&narrow, grid, &levels(&base), &hessian).unwrap_err().to_string();
        assert!(error.contains("256 inputs do not fit a weight with 128"), "{error}");
    });
}
