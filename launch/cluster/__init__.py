"""The processes of one job: how they find each other, agree, stop and fail together."""
