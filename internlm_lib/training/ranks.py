from internlm_lib.ranks.rank import rank_main as _rank_main
def rank_main(logs, work): _rank_main(work)
