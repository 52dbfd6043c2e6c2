"""The 89 feature columns of ShopWorld: their names, values, and what they depend on.

One line a column: name, then its values. The group says what moves it: the object of the true intent, its issue,
both, the single intent alone (`code`: which of many codes appears can not be put together from object and issue, and
has to be learnt from few sessions), or nothing about the intent (`region`, `user`, `plain`: noise, as in every log).
"""

from typing import NamedTuple

REGIONS = ("id", "th", "vn", "my", "ph", "sg", "tw", "br")
SEGMENTS = ("new", "regular", "loyal", "business")
INFORMATIVE = ("object", "issue", "both", "code")

_CATEGORICAL = {
    "object": """
        order_status placed paid packed shipped delivered handed_back
        parcel_state label hub transit customs courier dropped
        refund_state no_refund filed checking approved paid_out
        return_state no_return slip_made posted received
        payment_state charged pending bounced reversed
        voucher_state no_voucher unused applied expired
        coins_state empty earning frozen expiring
        login_state normal locked new_device reset
        address_state kept retyped unverified locker
        seller_chat quiet opened answered silent
        invoice_state no_invoice issued asked amended
        card_state no_card bought redeemed blocked
        warranty_state no_cover running claimed ended
        last_page orders wallet profile shop deals settings
        entry_point order_page wallet_page profile_page banner menu""",
    "issue": """
        wait_level short fair long very_long
        eta_gap early on_time overdue far_overdue
        scan_gap fresh one_day some_days over_week
        edit_tries no_edit one_edit more_edits
        cancel_button hidden shown tapped
        refusal_flag no_refusal soft hard
        risk_flag clean watch alert
        mismatch_flag matched size_off colour_off amount_off
        faq_reading no_faq rules_page steps_page costs_page
        search_verb track stop edit report appeal ask find fix
        last_error no_error timeout denied over_limit invalid
        push_opened no_push delay_push refusal_push safety_push""",
    "both": """
        search_topic st*8
        help_section hs*6
        ticket_topic tt*6""",
    "code": """
        last_form lf*40
        deep_link dl*40
        error_code ec*40
        last_button lb*40""",
    "region": """
        carrier swift eagle postal metro island
        warehouse wh*30
        bank_group bg*40
        wallet_brand wb*4
        app_language native english mixed
        delivery_promise same_day two_day week_long open_end
        tax_scheme flat tiered exempt
        holiday_mode off local national
        service_hours day_only late_too all_hours
        currency_view home dollar
        campaign cp*50""",
    "user": """
        device phone tablet desktop
        os_family droid fruit other_os
        app_version av*40
        age_band teen twenties thirties forties fifties
        city ct*60
        account_age weeks months year years
        loyalty_tier bronze silver gold platinum
        mail_opt_in opted_in opted_out
        push_opt_in push_on push_off
        favourite_category fashion gadgets home_ware beauty toys food
        preferred_hour dawn midday dusk midnight
        household single couple family
        referral friend advert organic
        font_size small medium big""",
    "plain": """
        network wifi fast_mobile slow_mobile
        battery low half full
        screen_mode bright dark
        weather sunny rainy cloudy stormy
        hour_band night morning afternoon evening
        weekday_type workday weekend
        ad_seen ad*60
        layout_test arm_a arm_b arm_c
        price_test price_a price_b
        cache_state cold warm
        server_zone sz*30
        feed_theme ft*30
        last_tab home_tab feed_tab cart_tab me_tab
        wishlist_topic wt*50
        live_stream not_live watched bought_live
        game_played no_game farm_game quiz_game
        share_action no_share shared""",
}
# A numeric column counts something: its values are the steps of a grid, its distribution a bell over the steps.
_NUMERIC = {
    "object": "open_orders coins_held",
    "issue": "days_since_update rage_taps page_revisits",
    "both": "days_since_order order_amount chat_messages",
    "plain": "items_in_cart visits_this_week sessions_today",
}
GRID = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)

# What a support agent would see, in the order of the prompt; the three texts come after these.
PROMPT_COLUMNS = (
    "order_status", "parcel_state", "refund_state", "payment_state", "coins_state", "login_state", "last_page",
    "wait_level", "eta_gap", "cancel_button", "refusal_flag", "risk_flag", "search_verb", "search_topic", "deep_link",
    "days_since_order", "device", "loyalty_tier",
)  # fmt: skip
TEXT_COLUMNS = ("item_title", "help_page", "event_text")


class Column(NamedTuple):
    """One discrete feature column: `values` in table order, `missing` the share of empty entries."""

    name: str
    kind: str  # categorical | numeric
    group: str
    values: tuple
    missing: float


def _values(written: list[str]) -> tuple[str, ...]:
    """Values as written above; `bg*40` stands for the codes bg1 to bg40."""
    if "*" not in written[0]:
        return tuple(written)
    code, count = written[0].split("*")
    return tuple(f"{code}{number}" for number in range(1, int(count) + 1))


def _columns() -> tuple[Column, ...]:
    """All drawn columns, informative groups first. Every third column has gaps, whatever the session is about."""
    found: list[tuple[str, str, str, tuple]] = []
    for group, text in _CATEGORICAL.items():
        rows = [line.split() for line in text.strip().splitlines()]
        found += [(name, "categorical", group, _values(values)) for name, *values in rows]
    for group, names in _NUMERIC.items():
        found += [(name, "numeric", group, GRID) for name in names.split()]
    return tuple(Column(*row, missing=(0.0, 0.0, 0.1)[i % 3]) for i, row in enumerate(found))


COLUMNS = _columns()
KINDS = {"region": "categorical", "user_segment": "categorical", **{column.name: column.kind for column in COLUMNS}}
