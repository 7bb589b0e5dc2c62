use super::*;
use crate::methods;
use hydralora_model::family::kit::{Q_PROJ, V_PROJ};
use serde_json::{Value, json};

const REFERENCE: &str = include_str!("../../tests/fixtures/analysis/reference.json");

fn tensor(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_f64(DType::F64, &rows.concat(), [rows.len(), rows[0].len()])
}

fn matrix(value: &Value) -> Vec<Vec<f64>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Numbers that have nothing to do with each other.
fn numbers(rows: usize, columns: usize, seed: f64) -> Vec<Vec<f64>> {
    let at = |i: usize, j: usize| (((i * columns + j) as f64 + 1.0) * seed).sin();
    (0..rows).map(|i| (0..columns).map(|j| at(i, j)).collect()).collect()
}

fn transposed(rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    (0..rows[0].len()).map(|j| rows.iter().map(|row| row[j]).collect()).collect()
}

fn product(x: &[Vec<f64>], y: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let columns = transposed(y);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.iter().map(|row| columns.iter().map(|column| dot(row, column)).collect()).collect()
}

fn of_b(rows: &[Vec<f64>]) -> Factor {
    Factor::of_b(&tensor(rows))
}

#[track_caller]
fn near(found: Option<f64>, expected: f64, within: f64) {
    let found = found.expect("a measure");
    assert!((found - expected).abs() <= within, "{found} instead of {expected}");
}

#[test]
fn random_factors_measure_as_numpy_says() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    for pair in reference["pairs"].as_array().unwrap() {
        let (x, y) = (matrix(&pair["x"]), matrix(&pair["y"]));
        let as_b = Likeness::between(&of_b(&x), &of_b(&y));
        let of_a = |rows: &[Vec<f64>]| Factor::of_a(&tensor(&transposed(rows)));
        let as_a = Likeness::between(&of_a(&x), &of_a(&y));
        for found in [as_a, as_b, Likeness::between(&of_b(&x), &of_a(&y))] {
            let expected = &pair["expected"];
            let of = |key: &str| expected[key].as_f64();
            assert_eq!(found.cosine.is_some(), of("cosine").is_some());
            for (found, key) in [
                (found.cosine, "cosine"),
                (found.cka, "cka"),
                (found.angle_cosine, "angle_cosine"),
                (found.chance, "chance"),
            ] {
                of(key).into_iter().for_each(|value| near(found, value, 1e-10));
            }
            near(found.largest_angle, of("largest_angle").unwrap(), 1e-6);
        }
    }
    for update in reference["updates"].as_array().unwrap() {
        let a = tensor(&matrix(&update["a"]));
        let heads: Vec<Vec<Vec<f64>>> = serde_json::from_value(update["b"].clone()).unwrap();
        let of = |key: &str| update[key].as_f64();
        // The heads' mean, as even gates make it.
        let count = heads.len() as f64;
        let mean: Vec<Vec<f64>> = (0..heads[0].len())
            .map(|i| {
                let column = |j: usize| heads.iter().map(|head| head[i][j]).sum::<f64>() / count;
                (0..a.rows()).map(column).collect()
            })
            .collect();
        let found = Spectrum::of(&a, &tensor(&mean), of("scale").unwrap()).unwrap();
        let expected: Vec<f64> = serde_json::from_value(update["singular_values"].clone()).unwrap();
        assert_eq!(found.singular_values.len(), expected.len());
        for (found, expected) in found.singular_values.iter().zip(&expected) {
            near(Some(*found), *expected, 1e-10);
        }
        near(found.effective_rank, of("effective_rank").unwrap(), 1e-10);
        let weights = SiteWeights {
            a: vec![a],
            b: heads.iter().map(|head| tensor(head)).collect(),
            update: Ok(found),
        };
        let measured = HeadMeasures::of(&weights);
        assert_eq!(measured.is_some(), heads.len() > 1);
        let Some(measured) = measured else { continue };
        near(measured.difference_share, of("difference_share").unwrap(), 1e-12);
        near(measured.update_cosine, of("update_cosine").unwrap(), 1e-12);
        assert!(measured.a.is_none());
    }
}

#[test]
fn the_same_is_wholly_alike_and_orthogonal_factors_are_not_at_all() {
    let x = numbers(9, 3, 1.3);
    let same = Likeness::between(&of_b(&x), &of_b(&x));
    near(same.cosine, 1.0, 1e-14);
    near(same.cka, 1.0, 1e-13);
    near(same.angle_cosine, 1.0, 1e-14);
    near(same.largest_angle, 0.0, 1e-12);
    // Columns of ±1 with mean 0, all orthogonal to each other.
    let signs = |bits: [usize; 2]| -> Vec<Vec<f64>> {
        let sign = |i: usize, bit: usize| {
            if (i & bit).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }
        };
        (0..8).map(|i| bits.iter().map(|&bit| sign(i, bit)).collect()).collect()
    };
    let apart = Likeness::between(&of_b(&signs([1, 2])), &of_b(&signs([4, 7])));
    near(apart.cosine, 0.0, 1e-15);
    near(apart.cka, 0.0, 1e-15);
    near(apart.angle_cosine, 0.0, 1e-14);
    near(apart.largest_angle, 90.0, 1e-12);
}

#[test]
fn rotations_of_the_rank_change_neither_cka_nor_angles() {
    let (x, y) = (numbers(10, 2, 0.7), numbers(10, 2, 2.1));
    let before = Likeness::between(&of_b(&x), &of_b(&y));
    for angle in [0.3_f64, 1.2, 2.9] {
        let turn = vec![vec![angle.cos(), -angle.sin()], vec![angle.sin(), angle.cos()]];
        let after = Likeness::between(&of_b(&product(&x, &turn)), &of_b(&y));
        near(after.cka, before.cka.unwrap(), 1e-13);
        near(after.angle_cosine, before.angle_cosine.unwrap(), 1e-13);
        near(after.largest_angle, before.largest_angle.unwrap(), 1e-10);
        assert!((after.cosine.unwrap() - before.cosine.unwrap()).abs() > 1e-3);
    }
    // Angles do not even know the lengths and angles of the columns.
    let skewed = vec![vec![3.0, 0.5], vec![-1.0, 0.2]];
    let after = Likeness::between(&of_b(&product(&x, &skewed)), &of_b(&y));
    near(after.angle_cosine, before.angle_cosine.unwrap(), 1e-12);
}

#[test]
fn small_angles_are_not_lost_in_their_cosine() {
    let tilt = 1e-9_f64;
    let x = vec![vec![1.0], vec![0.0], vec![0.0]];
    let y = vec![vec![tilt.cos()], vec![tilt.sin()], vec![0.0]];
    let found = Likeness::between(&of_b(&x), &of_b(&y));
    near(found.largest_angle, tilt.to_degrees(), 1e-15);
}

#[test]
fn what_makes_no_sense_is_not_measured() {
    let zero = of_b(&vec![vec![0.0; 2]; 5]);
    let x = of_b(&numbers(5, 2, 1.9));
    assert_eq!(Likeness::between(&zero, &x), Likeness::default());
    assert_eq!(Likeness::between(&x, &of_b(&numbers(6, 2, 1.9))), Likeness::default());
    let other_rank = Likeness::between(&x, &of_b(&numbers(5, 1, 1.1)));
    assert!(other_rank.cosine.is_none() && other_rank.cka.is_some());
    assert_eq!(Spectrum::from_values(vec![0.0; 3]).effective_rank, None);
}

#[test]
fn the_effective_rank_of_known_spectra() {
    near(Spectrum::from_values(vec![2.0; 5]).effective_rank, 5.0, 1e-12);
    near(Spectrum::from_values(vec![3.0, 0.0, 0.0]).effective_rank, 1.0, 1e-12);
    // Shares 1/2, 1/4, 1/4: entropy 1.5 ln 2.
    near(Spectrum::from_values(vec![2.0, 1.0, 1.0]).effective_rank, 2.0_f64.powf(1.5), 1e-12);
    // Rank above both widths, with a column twice.
    let (a, b) = (numbers(6, 4, 1.1), numbers(3, 6, 0.4));
    let found = Spectrum::of(&tensor(&a), &tensor(&b), -2.0).unwrap();
    let energy: f64 = product(&b, &a).concat().iter().map(|v| 4.0 * v * v).sum();
    near(Some(found.norm), energy.sqrt(), 1e-10);
    assert!(found.singular_values.is_sorted_by(|a, b| a >= b) && found.singular_values.len() == 3);
}

#[test]
fn shares_of_constructed_heads() {
    let of = |a: Vec<Tensor>, b: Vec<Tensor>| {
        let update = Err("not asked for".to_owned());
        HeadMeasures::of(&SiteWeights { a, b, update }).unwrap()
    };
    let a = numbers(2, 6, 0.9);
    let head = numbers(5, 2, 1.7);
    let same = of(vec![tensor(&a)], vec![tensor(&head); 3]);
    near(same.difference_share, 0.0, 1e-14);
    near(same.update_cosine, 1.0, 1e-14);
    // B and −B: the mean is nothing, all of it is difference.
    let minus: Vec<Vec<f64>> =
        head.iter().map(|row| row.iter().map(|value| -value).collect()).collect();
    let against = of(vec![tensor(&a)], vec![tensor(&head), tensor(&minus)]);
    near(against.difference_share, 1.0, 1e-14);
    // Every head its own A, by brute force.
    let (a, b): (Vec<_>, Vec<_>) = (0..3)
        .map(|n| (numbers(2, 6, 0.3 + n as f64), numbers(5, 2, 1.9 * (n as f64 + 1.0))))
        .unzip();
    let each: Vec<Vec<f64>> = a.iter().zip(&b).map(|(a, b)| product(b, a).concat()).collect();
    let energy = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
    let mean: Vec<f64> = (0..30).map(|at| each.iter().map(|d| d[at]).sum::<f64>() / 3.0).collect();
    let apart = |d: &Vec<f64>| energy(&d.iter().zip(&mean).map(|(d, m)| d - m).collect::<Vec<_>>());
    let expected =
        each.iter().map(apart).sum::<f64>() / each.iter().map(|d| energy(d)).sum::<f64>();
    let found = of(a.iter().map(|a| tensor(a)).collect(), b.iter().map(|b| tensor(b)).collect());
    near(found.difference_share, expected, 1e-12);
    assert!(found.a.is_some());
}

#[test]
fn points_are_as_far_apart_as_the_matrices() {
    let matrices: Vec<Vec<Vec<f64>>> = vec![
        numbers(2, 5, 0.3),
        numbers(2, 5, 1.1),
        numbers(2, 5, 0.3),
        numbers(4, 2, 0.8),
        numbers(2, 5, 2.3),
    ];
    let tensors: Vec<Tensor> = matrices.iter().map(|m| tensor(m)).collect();
    let kinds = [0, 0, 0, 1, 1];
    let points: Vec<(usize, &Tensor)> = kinds.into_iter().zip(&tensors).collect();
    let found = coordinates(&points);
    let unit = |at: usize| {
        let flat = matrices[at].concat();
        let norm = flat.iter().map(|v| v * v).sum::<f64>().sqrt();
        flat.into_iter().map(|v| v / norm).collect::<Vec<_>>()
    };
    for (i, j) in [(0, 1), (0, 2), (0, 3), (1, 4), (3, 4)] {
        let distance: f64 =
            (0..5).map(|k| f64::from(found[i * 5 + k] - found[j * 5 + k]).powi(2)).sum();
        let alike = kinds[i] == kinds[j] && tensors[i].shape() == tensors[j].shape();
        let expected = match alike {
            true => unit(i).iter().zip(unit(j)).map(|(a, b)| (a - b).powi(2)).sum(),
            false => 2.0,
        };
        near(Some(distance), expected, 1e-5);
    }
    assert!(coordinates(&[]).is_empty());
}

fn shapes() -> Vec<SiteShape> {
    [(&Q_PROJ, 6, 8), (&V_PROJ, 6, 4)]
        .map(|(linear, in_features, out_features)| SiteShape {
            site: Site { layer: 0, linear },
            in_features,
            out_features,
        })
        .to_vec()
}

fn built(method: &str, section: Value, seed: u64) -> Box<dyn Tuned> {
    let options = methods::find(method).unwrap().read_recipe(section.as_object().unwrap());
    let Ok(options) = options else { panic!("{method}: {section}") };
    options.build(&shapes(), DType::F32, seed)
}

#[test]
fn every_low_rank_method_shows_its_factors() {
    let folder = Path::new("nowhere");
    let experts = json!({"rank": 2, "num_experts": 3});
    for (method, section, counts) in [
        ("lora", json!({"rank": 2}), [1, 1]),
        ("hydralora", experts.clone(), [1, 3]),
        ("lora-split", experts.clone(), [3, 3]),
        ("loramoe", experts.clone(), [3, 3]),
        ("adalora", json!({}), [1, 1]),
        ("mtl-lora", json!({"rank": 2, "num_experts": 3, "domains": ["a", "b"]}), [1, 3]),
    ] {
        let tuned = built(method, section, 4);
        let found = weights(folder, tuned.as_ref()).unwrap_or_else(|e| panic!("{method}: {e}"));
        assert_eq!(found.len(), 2, "{method}");
        for (site, weights) in &found {
            assert_eq!([weights.a.len(), weights.b.len()], counts, "{method} {site}");
            let shape = shapes().into_iter().find(|shape| shape.site == *site).unwrap();
            assert!(weights.a.iter().all(|a| a.cols() == shape.in_features), "{method}");
            assert!(weights.b.iter().all(|b| b.rows() == shape.out_features), "{method}");
            // Where the domain weighs the heads, there is no one update.
            assert_eq!(weights.update.is_ok(), method != "mtl-lora", "{method}");
        }
        let again = initial_a(tuned.options(), &shapes(), 4).unwrap();
        let other = initial_a(tuned.options(), &shapes(), 5).unwrap();
        for (site, weights) in &found {
            let values = |all: &[Tensor]| all.iter().map(Tensor::to_f64).collect::<Vec<_>>();
            assert_eq!(values(&again[site]), values(&weights.a), "{method}");
            assert_ne!(values(&other[site]), values(&weights.a), "{method}");
        }
    }
}

#[test]
fn a_start_from_the_weights_is_not_drawn_again() {
    let tuned = built("lora", json!({"rank": 2, "init_lora_weights": "pissa"}), 4);
    let reason = initial_a(tuned.options(), &shapes(), 4).unwrap_err();
    assert!(reason.contains("base model's weights"), "{reason}");
}

/// `[out, N·r]` heads over one `A`, named as in a file.
fn hydra(a: &[Vec<f64>], heads: &[Vec<Vec<f64>>]) -> TensorMap {
    let name = |part: &str| format!("model.layers.0.self_attn.q_proj.{part}.weight");
    let each = heads.iter().enumerate();
    let mut map: TensorMap = each.map(|(i, b)| (name(&format!("lora_B{i}")), tensor(b))).collect();
    map.insert(name("lora_A"), tensor(a));
    map
}

#[test]
fn heads_are_measured_alike_by_both_ways() {
    let a = numbers(2, 5, 0.7);
    let many: Vec<Vec<Vec<f64>>> = [0.3, 0.9, 1.7].map(|seed| numbers(6, 2, seed)).to_vec();
    let found = heads(hydra(&a, &many));
    let found = found.values().next().unwrap();
    let weights = SiteWeights {
        a: vec![tensor(&a)],
        b: many.iter().map(|b| tensor(b)).collect(),
        update: Err(String::new()),
    };
    let slow = HeadMeasures::of(&weights).unwrap();
    near(found.cosine, slow.b.cosine.unwrap(), 1e-12);
    let own: f64 = (0..3).map(|i| found.products[i][i]).sum();
    near(Some(own), slow.energy, 1e-9);
    let side_by_side: Vec<Vec<f64>> =
        (0..6).map(|row| many.iter().flat_map(|b| b[row].clone()).collect()).collect();
    let identity: Vec<Vec<f64>> =
        (0..6).map(|i| (0..6).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let spectrum = Spectrum::of(&tensor(&identity), &tensor(&side_by_side), 1.0).unwrap();
    near(found.rank, spectrum.effective_rank.unwrap(), 1e-6);
    assert_eq!((found.num_heads, found.full_rank), (3, 6));
}

#[test]
fn differences_of_heads_carry_what_gates_let_them() {
    let (a, b) = (numbers(2, 5, 0.7), numbers(6, 2, 0.3));
    let minus: Vec<Vec<f64>> = b.iter().map(|row| row.iter().map(|v| -v).collect()).collect();
    let site = |heads_: &[Vec<Vec<f64>>]| heads(hydra(&a, heads_)).into_values().next().unwrap();
    let even = [0.25; 4];
    // Every token at one head, half of them at each.
    let hard = [0.5, 0.0, 0.0, 0.5];
    let copies = site(&[b.clone(), b.clone()]);
    near(copies.cosine, 1.0, 1e-12);
    near(copies.difference_share(&hard), 0.0, 1e-12);
    assert!(copies.rank.unwrap() < 2.0 + 1e-6);
    let opposed = site(&[b.clone(), minus]);
    near(opposed.cosine, -1.0, 1e-12);
    near(opposed.difference_share(&hard), 1.0, 1e-12);
    let apart = site(&[b, numbers(6, 2, 1.7)]);
    near(apart.difference_share(&even), 0.0, 1e-12);
    assert!(apart.difference_share(&hard).unwrap() > 0.1);
    assert_eq!(apart.difference_share(&[1.0]), None);
    let zero = vec![vec![0.0; 2]; 6];
    let idle = site(&[zero.clone(), zero]);
    assert_eq!((idle.cosine, idle.rank, idle.difference_share(&hard)), (None, None, None));
}
