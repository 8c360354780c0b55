//! Optimizers and schedules against the numbers that MLX 0.32 (mlx.optimizers, on a CPU) and mlx-lm 0.32.2 give.

use graft_ops::Array;
use graft_train::{Optimizer, Schedule, clip_factor, global_norm};
use serde_json::json;

use crate::support::{arrays, number, values};

/// Three updates of w (2, 3) and b (2,) with gradients that change.
fn three_updates(name: &str, config: &serde_json::Value, rate: f64) -> Vec<f32> {
    let w = Array::from_slice(&[0.5f32, -0.25, 1.0, 0.125, 0.75, -0.5], &[2, 3]);
    let b = Array::from_slice(&[1.0f32, -2.0], &[2]);
    let optimizer = Optimizer::from_config(name, config.as_object().unwrap()).unwrap();
    let mut params = vec![w, b];
    let mut state = optimizer.start(&params).unwrap();
    for t in [1.0f32, 2.0, 3.0] {
        let gw = [0.3f32, -0.2, 0.1, 0.05, 0.4, -0.6].map(|x| x * t);
        let gb = [0.7 + 0.1 * t, -0.1 + 0.1 * t];
        let grads = [Array::from_slice(&gw, &[2, 3]), Array::from_slice(&gb, &[2])];
        (params, state) = optimizer.update(rate, &params, &grads, &state).unwrap();
    }
    assert_eq!(state.step, 3);
    params.iter().flat_map(values).collect()
}

#[test]
fn optimizers_are_those_of_mlx() {
    arrays(|| {
        let cases = [
            (
                "adam",
                json!({}),
                [
                    0.37993768,
                    -0.12993771,
                    0.87993789,
                    0.0049380101,
                    0.62993765,
                    -0.37993765,
                    0.87614429,
                    -2.072639,
                ],
            ),
            (
                "adam",
                json!({"bias_correction": true}),
                [
                    0.47076836,
                    -0.22076838,
                    0.97076839,
                    0.09576837,
                    0.72076839,
                    -0.47076836,
                    0.96995085,
                    -2.015727,
                ],
            ),
            (
                "adamw",
                json!({}),
                [
                    0.37979808,
                    -0.12987313,
                    0.87964821,
                    0.0049109384,
                    0.62972313,
                    -0.37979805,
                    0.87585485,
                    -2.0720358,
                ],
            ),
            (
                "sgd",
                json!({}),
                [
                    0.48199999,
                    -0.23800001,
                    0.99400002,
                    0.12199999,
                    0.72599995,
                    -0.46399999,
                    0.97299999,
                    -2.003,
                ],
            ),
            (
                "sgd",
                json!({"momentum": 0.9, "nesterov": true, "weight_decay": 0.1}),
                [
                    0.45235798,
                    -0.21890825,
                    0.97742343,
                    0.11672486,
                    0.6858077,
                    -0.40873355,
                    0.92117774,
                    -1.9904362,
                ],
            ),
            (
                "sgd",
                json!({"momentum": 0.9, "dampening": 0.5}),
                [0.48573497, -0.24048999, 0.99524498, 0.1226225, 0.73098004, -0.47147, 0.97561002, -2.00195],
            ),
            (
                "muon",
                json!({}),
                [
                    0.47065628,
                    -0.23924522,
                    1.0020652,
                    0.11720125,
                    0.74009764,
                    -0.48138747,
                    0.99621487,
                    -2.0002525,
                ],
            ),
            (
                "adafactor",
                json!({}),
                [
                    0.46686095,
                    -0.23497534,
                    0.9944768,
                    0.12214103,
                    0.73444551,
                    -0.48284617,
                    0.9566915,
                    -2.0352113,
                ],
            ),
            (
                "adafactor",
                json!({"relative_step": false, "scale_parameter": false, "beta_1": 0.9, "weight_decay": 0.1}),
                [
                    0.4880583,
                    -0.24451597,
                    0.99526244,
                    0.12372442,
                    0.74285048,
                    -0.49309576,
                    0.99176443,
                    -1.9972308,
                ],
            ),
        ];
        for (name, config, expected) in cases {
            let found = three_updates(name, &config, 1e-2);
            for (x, y) in found.iter().zip(expected) {
                assert!((x - y).abs() < 2e-6, "{name} {config}: {found:?}, MLX has {expected:?}");
            }
        }
    });
}

#[test]
fn unknown_settings_of_an_optimizer_are_refused() {
    let refused = |name: &str, config: &serde_json::Value| {
        Optimizer::from_config(name, config.as_object().unwrap()).unwrap_err().to_string()
    };
    assert!(refused("adam", &json!({"weight_decay": 0.1})).contains("optimizer_config.adam.weight_decay"));
    assert!(refused("adamw", &json!({"betas": [0.9]})).contains("a list of two numbers"));
    assert!(refused("sgd", &json!({"nesterov": true})).contains("momentum"));
    assert!(refused("lion", &json!({})).contains("adafactor"));
}

#[test]
fn gradients_are_clipped_together() {
    arrays(|| {
        let grads = [Array::from_slice(&[3.0f32, 0.0], &[2]), Array::from_slice(&[4.0f32], &[1])];
        let norm = global_norm(&grads).unwrap();
        assert_eq!(number(&norm), 5.0);
        assert!((number(&clip_factor(&norm, 1.0).unwrap()) - 0.2).abs() < 1e-6);
        assert_eq!(number(&clip_factor(&norm, 10.0).unwrap()), 1.0);
    });
}

#[test]
fn schedules_are_those_of_mlx_lm() {
    let cases = [
        (
            json!({"name": "cosine_decay", "arguments": [1e-3, 10], "warmup": 3}),
            [
                0.0,
                0.000333333,
                0.000666667,
                0.001,
                0.001,
                0.000975528,
                0.000904509,
                0.000793893,
                0.000654508,
                0.0005,
                0.000345491,
                0.000206107,
            ],
        ),
        (
            json!({"name": "cosine_decay", "arguments": [1e-3, 10, 1e-4]}),
            [
                0.001,
                0.000977975,
                0.000914058,
                0.000814503,
                0.000689058,
                0.00055,
                0.000410942,
                0.000285497,
                0.000185942,
                0.000122025,
                0.0001,
                0.0001,
            ],
        ),
        (
            json!({"name": "linear_schedule", "arguments": [1e-3, 1e-4, 5]}),
            [
                0.001, 0.00082, 0.00064, 0.00046, 0.00028, 0.0001, 0.0001, 0.0001, 0.0001, 0.0001, 0.0001,
                0.0001,
            ],
        ),
        (
            json!({"name": "exponential_decay", "arguments": [1e-3, 0.5]}),
            [
                0.001,
                0.0005,
                0.00025,
                0.000125,
                6.25e-05,
                3.125e-05,
                1.5625e-05,
                7.8125e-06,
                3.90625e-06,
                1.95313e-06,
                9.76563e-07,
                4.88281e-07,
            ],
        ),
        (
            json!({"name": "step_decay", "arguments": [1e-3, 0.5, 4], "warmup": 2, "warmup_init": 1e-4}),
            [0.0001, 0.00055, 0.001, 0.001, 0.001, 0.001, 0.001, 0.0005, 0.0005, 0.0005, 0.0005, 0.00025],
        ),
    ];
    for (config, expected) in cases {
        let schedule = Schedule::from_value(&config).unwrap();
        for (t, y) in expected.into_iter().enumerate() {
            let x = schedule.at(t as u64);
            assert!((x - y).abs() <= 1e-5 * y.abs().max(1e-4), "{config}: at {t} {x}, mlx-lm has {y}");
        }
    }
    for bad in [
        json!({"name": "cosine", "arguments": [1]}),
        json!({"name": "cosine_decay", "arguments": [1e-3, 0.5]}),
        json!(3),
    ] {
        assert!(Schedule::from_value(&bad).unwrap_err().to_string().starts_with("lr_schedule"));
    }
}
