//! AdaLoRA: `y = W0 x + alpha / (r₀ + 1e-5) · B (E ⊙ A x)`, a singular value decomposition in form,
//! whose singular values `E` of least importance are set to zero while training, until the budget is
//! `target_r` per layer on average.
//!
//! ```text
//! I = |θ ∂L/∂θ|        Ī ← β₁ Ī + (1 − β₁) I        U ← β₂ U + (1 − β₂) |I − Ī|
//! score_k = (Ī U)(E_k) + mean (Ī U)(A_k,:) + mean (Ī U)(B_:,k)
//! b(t) = b_T + (b_0 − b_T)(1 − (t − t_init) / (T − t_final − t_init))³
//! L += orth_reg_weight · mean over all A, B of ‖A Aᵀ − I‖_F, ‖Bᵀ B − I‖_F
//! ```
//!
//! Zhang et al., arXiv 2303.10512, in PEFT's reading: the norms are not squared, the scale keeps the
//! rank `r₀ = init_r` of the start, importance is taken with the values after the optimizer's step,
//! and a value set to zero may grow again until the budget is final at `T − t_final`.

use crate::described::Described;
use crate::error::{Error, Fault, Result};
use crate::io::{plain_name, site_of};
use crate::method::{MethodOptions, product};
use crate::options::{LoraConfigKeys, check_common, to_map};
use crate::random::{layer_dropout, normal};
use crate::section::read_section;
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, export_by_name, take_tensor};
use crate::tuned::{Mergeable, Parameters, Persist, TrainHooks, TrainingPlan, Tuned};
use hydralora_kernels::ops::elementwise::{add, scale, scale_rows};
use hydralora_kernels::ops::low_rank::Mask;
use hydralora_kernels::ops::orthogonality::{Side, orthogonality};
use hydralora_kernels::{DType, Gradients, Tensor, Var, dispatch};
use hydralora_model::adapter::{Adapter, HeadGates, LowRankUpdate, Pass, Site, SiteShape, Update};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Options of AdaLoRA in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Rank every layer starts with.
    init_r: usize,
    /// Rank that is left per layer on average.
    target_r: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Dropout probability on the input of `A`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
    /// Steps before the budget falls.
    tinit: usize,
    /// Steps after the budget is final.
    tfinal: usize,
    /// Steps between allocations.
    delta_t: usize,
    /// Smoothing of the sensitivity.
    beta1: f64,
    /// Smoothing of the uncertainty.
    beta2: f64,
    /// Factor on the distance from orthonormality.
    orth_reg_weight: f64,
    /// Steps of the schedule; those of the run if not given.
    total_step: Option<usize>,
    /// Which singular values a file kept; it may hold only their rows.
    #[serde(skip)]
    kept: BTreeMap<Site, Vec<bool>>,
}

impl Default for Options {
    /// PEFT's.
    fn default() -> Self {
        Self {
            init_r: 12,
            target_r: 8,
            alpha: 8.0,
            dropout: 0.0,
            targets: Targets::One("all".to_owned()),
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            kept: BTreeMap::new(),
        }
    }
}

impl Options {
    /// A fault if the budget has no step to fall in.
    fn schedule_fault(&self, total: usize) -> Option<Fault> {
        let (tinit, tfinal) = (self.tinit, self.tfinal);
        (total <= tinit.saturating_add(tfinal)).then(|| {
            let message = format!(
                "tinit {tinit} and tfinal {tfinal} leave no step of {total} to lower the budget in"
            );
            Fault::new("method.tinit", message)
        })
    }

    fn peft_scale(&self) -> f64 {
        self.alpha / (self.init_r as f64 + 1e-5)
    }
}

/// Options that a file names as a recipe does.
const OWN_KEYS: [&str; 8] =
    ["init_r", "target_r", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight", "total_step"];

impl Described for Options {
    const NAME: &'static str = "adalora";
    const SUMMARY: &'static str = "LoRA whose rank moves to the layers that need it while training";
    const PEFT_TYPE: &'static str = "ADALORA";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.init_r, self.alpha, self.dropout, &self.targets);
        for fault in &mut faults {
            if fault.field == "method.rank" {
                fault.field = "method.init_r".to_owned();
            }
        }
        let mut check = |right: bool, option: &str, found: String, expected: &str| {
            if !right {
                let message = format!("is {found}; expected {expected}");
                faults.push(Fault::new(format!("method.{option}"), message));
            }
        };
        let target = self.target_r;
        check((1..=self.init_r).contains(&target), "target_r", target.to_string(), "1 to init_r");
        check(self.delta_t > 0, "delta_t", "0".to_owned(), "at least 1");
        for (option, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            check(beta > 0.0 && beta < 1.0, option, beta.to_string(), "a number between 0 and 1");
        }
        let weight = self.orth_reg_weight;
        let right = weight.is_finite() && weight >= 0.0;
        check(right, "orth_reg_weight", weight.to_string(), "0 or more");
        if let Some(total) = self.total_step {
            faults.extend(self.schedule_fault(total));
        }
        faults
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        let mut own: Map<String, Value> = OWN_KEYS
            .into_iter()
            .filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())))
            .collect();
        if let Some(steps) = config.get("deltaT") {
            own.insert("delta_t".to_owned(), steps.clone());
        }
        let options: Self = read_section("adapter_config", &own, &Self::default().to_recipe())?;
        let mut common = config.clone();
        common.insert("r".to_owned(), json!(options.init_r));
        let pattern = common.remove("rank_pattern");
        let keys = LoraConfigKeys::read(&common, &[], false)?;
        let mut faults = Vec::new();
        if keys.use_rslora {
            faults.push(Fault::new("use_rslora", "`true` is not supported here"));
        }
        let kept = read_pattern(pattern.as_ref(), options.init_r).unwrap_or_else(|fault| {
            faults.push(fault);
            BTreeMap::new()
        });
        let options = Self {
            alpha: keys.alpha,
            dropout: keys.dropout,
            targets: keys.targets,
            kept,
            ..options
        };
        // The layers are taken from the tensors, so what a file calls its targets is not checked.
        let any = Self { targets: Targets::One("all".to_owned()), ..options.clone() };
        faults.extend(any.faults());
        if faults.is_empty() { Ok(options) } else { Err(faults) }
    }
}

/// PEFT's `rank_pattern`: which singular values are left, by the name of their tensor.
fn read_pattern(
    pattern: Option<&Value>,
    init_r: usize,
) -> Result<BTreeMap<Site, Vec<bool>>, Fault> {
    let wrong = |message: String| Fault::new("rank_pattern", message);
    let entries = match pattern {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(wrong(format!("`{other}`; expected an object"))),
    };
    let flag = |value: &Value| match value {
        Value::Bool(kept) => Some(*kept),
        Value::Array(one) if one.len() == 1 => one[0].as_bool(),
        _ => None,
    };
    entries
        .iter()
        .map(|(name, flags)| {
            let site = site_of(&plain_name(name))
                .ok_or_else(|| wrong(format!("`{name}` names no layer")))?;
            let flags = flags.as_array().map(|flags| flags.iter().map(flag).collect::<Vec<_>>());
            let flags: Option<Vec<bool>> = flags.and_then(|flags| flags.into_iter().collect());
            match flags.filter(|flags| flags.len() == init_r) {
                Some(flags) => Ok((site, flags)),
                None => Err(wrong(format!("`{name}`: expected {init_r} times true or false"))),
            }
        })
        .collect()
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = LoraConfigKeys {
            rank: self.init_r,
            alpha: self.alpha,
            use_rslora: false,
            dropout: self.dropout,
            targets: self.targets.clone(),
            ..LoraConfigKeys::default()
        }
        .write("ADALORA");
        let recipe = self.to_recipe();
        for key in OWN_KEYS {
            config.insert(key.to_owned(), recipe[key].clone());
        }
        config.insert("deltaT".to_owned(), json!(self.delta_t));
        // PEFT refuses a configuration without a schedule, even to load it.
        let shortest = self.tinit.saturating_add(self.tfinal).saturating_add(1);
        let total = self.total_step.unwrap_or(shortest);
        config.insert("total_step".to_owned(), json!(total));
        // All rows are stored, with zeros in E for those that are not kept.
        config.insert("rank_pattern".to_owned(), Value::Null);
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let of_site = |shape: &SiteShape| {
            let kept = self.kept.get(&shape.site).map(|kept| kept.iter().filter(|k| **k).count());
            let width = shape.in_features.saturating_add(shape.out_features).saturating_add(1);
            product(&[kept.unwrap_or(self.init_r), width])
        };
        sites.iter().map(of_site).fold(0, usize::saturating_add)
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let rank = self.init_r;
        let tensors = |shape: &SiteShape| {
            let SiteShape { site, in_features, out_features } = *shape;
            let gaussian = |name: &str, role: Role, extent: [usize; 2]| {
                let name = format!("{site}.{name}");
                let start = normal(seed, &name, 0.02, dtype, extent);
                Trainable::new(name, role, start)
            };
            let zeros = Tensor::zeros(dtype, [rank, 1]);
            let parts = [
                gaussian("lora_A", Role::A, [rank, in_features]),
                Trainable::new(format!("{site}.lora_E"), Role::Scale, zeros),
                gaussian("lora_B", Role::B, [out_features, rank]),
            ];
            (site, parts)
        };
        Box::new(AdaLoraAdapter {
            options: self.clone(),
            sites: sites.iter().map(tensors).collect(),
            importance: BTreeMap::new(),
            kept: self.kept.clone(),
        })
    }
}

/// Positions of the three tensors of a site.
const A: usize = 0;
const E: usize = 1;
const B: usize = 2;

/// Smoothed sensitivity and uncertainty of one tensor.
#[derive(Clone)]
struct Importance {
    sensitivity: Tensor,
    uncertainty: Tensor,
}

/// A live AdaLoRA adapter.
struct AdaLoraAdapter {
    options: Options,
    sites: BTreeMap<Site, [Trainable; 3]>,
    /// Empty before the first step and once the budget is final.
    importance: BTreeMap<Site, [Importance; 3]>,
    /// Which singular values the last allocation kept.
    kept: BTreeMap<Site, Vec<bool>>,
}

impl AdaLoraAdapter {
    /// The budget after `step`, if it is allocated anew there.
    fn budget(&self, step: usize, total: usize) -> Option<usize> {
        let o = &self.options;
        if step <= o.tinit || !step.is_multiple_of(o.delta_t) {
            return None;
        }
        let [start, end] = [o.init_r, o.target_r].map(|rank| rank * self.sites.len());
        let span = (total - o.tfinal - o.tinit) as f64;
        let left = 1.0 - (step - o.tinit) as f64 / span;
        Some(((start - end) as f64 * left.powi(3) + end as f64) as usize)
    }

    fn update_importance(&mut self, gradients: &Gradients) {
        let (beta1, beta2) = (self.options.beta1, self.options.beta2);
        for (&site, tensors) in &self.sites {
            let importance = self.importance.entry(site).or_insert_with(|| {
                [A, E, B].map(|index| {
                    let value = tensors[index].parameter.value();
                    let zeros = Tensor::zeros(value.dtype(), value.shape());
                    Importance { sensitivity: zeros.clone(), uncertainty: zeros }
                })
            });
            for (tensor, importance) in tensors.iter().zip(importance) {
                let Some(gradient) = gradients.get(tensor.var()) else { continue };
                let value = tensor.parameter.value();
                dispatch!(value.dtype(), |T| {
                    let (beta1, rest1) = (beta1 as T, (1.0 - beta1) as T);
                    let (beta2, rest2) = (beta2 as T, (1.0 - beta2) as T);
                    let smoothed = importance.sensitivity.data_mut::<T>();
                    let spread = importance.uncertainty.data_mut::<T>();
                    let now = value.data::<T>().iter().zip(gradient.data::<T>());
                    for (((&v, &g), i), u) in now.zip(smoothed).zip(spread) {
                        let sensitivity = (v * g).abs();
                        *i = beta1 * *i + rest1 * sensitivity;
                        *u = beta2 * *u + rest2 * (sensitivity - *i).abs();
                    }
                });
            }
        }
    }

    /// The importance of every singular value of a site with its row of `A` and column of `B`.
    fn scores(importance: &[Importance; 3]) -> Vec<f64> {
        let [a, e, b] = [A, E, B].map(|index| {
            let Importance { sensitivity, uncertainty } = &importance[index];
            let pairs = sensitivity.to_f64().into_iter().zip(uncertainty.to_f64());
            pairs.map(|(i, u)| i * u).collect::<Vec<f64>>()
        });
        let rank = e.len();
        let (inputs, outputs) = (a.len() / rank, b.len() / rank);
        (0..rank)
            .map(|k| {
                let row = a[k * inputs..(k + 1) * inputs].iter().sum::<f64>() / inputs as f64;
                let column = b.iter().skip(k).step_by(rank).sum::<f64>() / outputs as f64;
                e[k] + (row + column)
            })
            .collect()
    }

    /// Keeps the `budget` most important singular values of all sites together.
    fn allocate(&mut self, budget: usize) {
        let scores: BTreeMap<Site, Vec<f64>> =
            self.importance.iter().map(|(&site, found)| (site, Self::scores(found))).collect();
        let mut all: Vec<f64> = scores.values().flatten().copied().collect();
        let dropped = all.len().saturating_sub(budget);
        if dropped == 0 {
            return;
        }
        let (_, threshold, _) = all.select_nth_unstable_by(dropped - 1, f64::total_cmp);
        let threshold = *threshold;
        self.kept = scores
            .into_iter()
            .map(|(site, scores)| (site, scores.iter().map(|&s| s > threshold).collect()))
            .collect();
        self.mask();
    }

    /// Sets the singular values that are not kept to zero.
    fn mask(&mut self) {
        for (site, tensors) in &mut self.sites {
            let Some(kept) = self.kept.get(site) else { continue };
            let value = tensors[E].parameter.value_mut();
            dispatch!(value.dtype(), |T| {
                for (value, &kept) in value.data_mut::<T>().iter_mut().zip(kept) {
                    if !kept {
                        *value = 0.0;
                    }
                }
            });
        }
    }
}

impl Adapter for AdaLoraAdapter {
    fn rows_stand_alone(&self) -> bool {
        true
    }

    fn update(&self, site: Site, _rows: usize, pass: &Pass<'_>) -> Update<'_> {
        let Some(tensors) = self.sites.get(&site) else { return Update::None };
        let dropout = layer_dropout(site, self.options.dropout, pass);
        Update::LowRank(LowRankUpdate {
            a: scale_rows(tensors[A].var(), tensors[E].var()),
            b: tensors[B].var().clone(),
            num_experts: 1,
            gates: HeadGates::Sum,
            scale: self.options.peft_scale(),
            mask: dropout.map_or(Mask::None, Mask::Shared),
        })
    }
}

impl Parameters for AdaLoraAdapter {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.sites.values().flatten().collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.sites.values_mut().flatten().collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        export_by_name(self.trainables(), pick)
    }
}

impl Persist for AdaLoraAdapter {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        let rank = self.options.init_r;
        for (site, parts) in &mut self.sites {
            // A file may hold only the rows of the singular values it kept.
            let found = tensors.get(parts[E].parameter.name()).map(Tensor::rows);
            let pattern = self.options.kept.get(site).filter(|kept| {
                found != Some(rank) && found == Some(kept.iter().filter(|kept| **kept).count())
            });
            let rows: Vec<usize> = match pattern {
                Some(kept) => (0..rank).filter(|&k| kept[k]).collect(),
                None => (0..rank).collect(),
            };
            for (index, part) in parts.iter_mut().enumerate() {
                let parameter = &mut part.parameter;
                let name = parameter.name().to_owned();
                let full = parameter.value().shape().to_vec();
                let wanted = if index == B { [full[0], rows.len()] } else { [rows.len(), full[1]] };
                let Some(tensor) = take_tensor(tensors, &name, &wanted, &mut faults) else {
                    continue;
                };
                let dtype = parameter.value().dtype();
                let from = tensor.to_dtype(dtype);
                let mut value =
                    if index == E { Tensor::zeros(dtype, full) } else { parameter.value().clone() };
                dispatch!(dtype, |T| {
                    let (out, from) = (value.data_mut::<T>(), from.data::<T>());
                    let width = wanted[1];
                    if index == B {
                        for (out, from) in out.chunks_exact_mut(rank).zip(from.chunks(width.max(1)))
                        {
                            for (&k, &from) in rows.iter().zip(from) {
                                out[k] = from;
                            }
                        }
                    } else {
                        for (&k, from) in rows.iter().zip(from.chunks_exact(width.max(1))) {
                            out[k * width..(k + 1) * width].copy_from_slice(from);
                        }
                    }
                });
                parameter.set(value);
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn state(&self) -> TensorMap {
        let mut map = TensorMap::new();
        for (site, importance) in &self.importance {
            for (tensor, found) in self.sites[site].iter().zip(importance) {
                let name = tensor.parameter.name();
                map.insert(format!("{name}.sensitivity"), found.sensitivity.clone());
                map.insert(format!("{name}.uncertainty"), found.uncertainty.clone());
            }
        }
        for (site, kept) in &self.kept {
            let flags: Vec<f64> = kept.iter().map(|&kept| f64::from(u8::from(kept))).collect();
            let dtype = self.sites.get(site).map_or(DType::F32, |t| t[E].parameter.value().dtype());
            let tensor = Tensor::from_f64(dtype, &flags, [flags.len()]);
            map.insert(format!("{site}.lora_E.kept"), tensor);
        }
        map
    }

    fn load_state(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        self.importance.clear();
        let measured = tensors.keys().any(|name| name.ends_with(".sensitivity"));
        for (&site, parts) in &self.sites {
            let name = format!("{site}.lora_E.kept");
            if tensors.contains_key(&name)
                && let Some(flags) =
                    take_tensor(tensors, &name, &[self.options.init_r], &mut faults)
            {
                self.kept.insert(site, flags.to_f64().iter().map(|&flag| flag != 0.0).collect());
            }
            if !measured {
                continue;
            }
            let mut take = |index: usize, kind: &str| {
                let parameter = &parts[index].parameter;
                let name = format!("{}.{kind}", parameter.name());
                take_tensor(tensors, &name, parameter.value().shape(), &mut faults)
                    .unwrap_or_else(|| parameter.value().clone())
            };
            let importance = [A, E, B].map(|index| Importance {
                sensitivity: take(index, "sensitivity"),
                uncertainty: take(index, "uncertainty"),
            });
            self.importance.insert(site, importance);
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

impl TrainHooks for AdaLoraAdapter {
    fn needs_whole_batches(&self) -> Vec<&'static str> {
        if self.options.dropout > 0.0 { vec!["method.dropout"] } else { Vec::new() }
    }

    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        let total = *self.options.total_step.get_or_insert(plan.total_steps);
        match self.options.schedule_fault(total) {
            Some(fault) => Err(Error::Options { faults: vec![fault] }),
            None => Ok(()),
        }
    }

    fn aux_loss(&self, _pass: &Pass<'_>) -> Option<Var> {
        let weight = self.options.orth_reg_weight;
        if weight == 0.0 {
            return None;
        }
        let terms = self.sites.values().flat_map(|tensors| {
            [(A, Side::Rows), (B, Side::Columns)]
                .map(|(index, side)| orthogonality(tensors[index].var(), side))
        });
        let total = terms.reduce(|sum, term| add(&sum, term))?;
        Some(scale(&total, weight / (2 * self.sites.len()) as f64))
    }

    fn after_step(&mut self, step: usize, gradients: &Gradients) {
        let Some(total) = self.options.total_step else { return };
        let last = total.saturating_sub(self.options.tfinal);
        match step.cmp(&last) {
            Ordering::Less => {
                self.update_importance(gradients);
                if let Some(budget) = self.budget(step, total) {
                    self.allocate(budget);
                }
            }
            Ordering::Equal => {
                self.allocate(self.options.target_r * self.sites.len());
                self.importance.clear();
            }
            Ordering::Greater => self.mask(),
        }
    }
}

impl Mergeable for AdaLoraAdapter {}

impl Tuned for AdaLoraAdapter {}
